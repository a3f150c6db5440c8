"""What is said of a row that cannot be used."""

from __future__ import annotations

_SHOWN = 120
"""Characters of an offending value that a reason shows."""


class BadRowError(ValueError):
    """Why a row cannot be used."""


def shorten(value: object) -> str:
    """How a message shows an offending value: as Python writes it, at most 120 characters of it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
