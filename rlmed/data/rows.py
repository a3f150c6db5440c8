"""What is said of a row that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = 120
"""Characters of an offending value that a reason shows."""


class BadRowError(ValueError):
    """Why a row cannot be used."""


def as_object(row: Any) -> Mapping[str, Any]:
    """A row as the JSON object that it must be.

    Args:
        row: what a file holds, or why it holds nothing that can be used.

    Raises:
        BadRowError: for anything else.
    """
    if isinstance(row, BadRowError):
        raise row
    if not isinstance(row, Mapping):
        raise BadRowError(f"it is no JSON object but {shorten(row)}")
    return row


def shorten(value: object) -> str:
    """How a message shows an offending value: as Python writes it, at most 120 characters of it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
