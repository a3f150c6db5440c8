"""Reasons why a row cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = 120
"""Most characters of an offending value that a reason shows."""


class BadRowError(ValueError):
    """Why a row cannot be used."""


def as_object(row: Any) -> Mapping[str, Any]:
    """Return the row, which must be a JSON object.

    Args:
        row: what a file holds, or why it is unusable.

    Raises:
        BadRowError: for anything else.
    """
    if isinstance(row, BadRowError):
        raise row
    if not isinstance(row, Mapping):
        raise BadRowError(f"it is not a JSON object but {shorten(row)}")
    return row


def shorten(value: object) -> str:
    """Format an offending value for a message: its `repr`, at most 120 characters of it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
