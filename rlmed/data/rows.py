"""Reasons why a row cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlmed.core.spelling import shorten as shorten


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
