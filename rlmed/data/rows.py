"""Reasons why a row cannot be used, and how messages put many of them together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlmed.core.spelling import SHOWN
from rlmed.core.spelling import shorten as shorten

_VALUE = re.compile(r"[\[{]|(?<!\w)['\"]|\S*[/\\]\S*|\S+\.\w{1,5}\b|-?\d[\d.,]*")
"""Where something begins that differs between two rows with the same fault: a list, an object or a
quoted text, whose end `_end` finds, or a whole path, file or number.
"""


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


def grouped(reasons: Sequence[tuple[str, str]]) -> list[str]:
    """Return a text for each kind of reason, the most common first.

    Args:
        reasons: where a row is, and what is wrong with it.

    Example:
        >>> grouped([("line 1", "image 'a' is damaged"), ("line 2", "it has no answer"), ("line 3", "image 'b' is damaged")])
        ["2 rows, such as line 1: image 'a' is damaged", 'line 2: it has no answer']
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for where, reason in reasons:
        kinds.setdefault(_without_values(reason), []).append((where, reason))
    ordered = sorted(kinds.values(), key=len, reverse=True)  # stable: then in the order of the rows
    return [f"{f'{len(rows)} rows, such as ' if len(rows) > 1 else ''}{rows[0][0]}: {rows[0][1]}" for rows in ordered]


def _without_values(reason: str) -> str:
    """Return the reason with `…` for each value."""
    kept, place = "", 0
    while found := _VALUE.search(reason, place):
        start, opening = found.start(), found[0] in ("[", "{", "'", '"')
        end = _end(reason, start) if opening else found.end()
        kept += reason[place:start] + ("…" if end else found[0])
        place = end or start + 1
    return kept + reason[place:]


def _end(text: str, start: int) -> int | None:
    """Return where a value that begins here ends, perhaps cut by `shorten`; None if it does not."""
    cut = start + SHOWN if text[start + SHOWN : start + SHOWN + 1] == "…" else None
    depth, quote, escaped = 0, "", False
    for place in range(start, cut or len(text)):
        letter = text[place]
        if quote:
            if letter == quote and not escaped:
                quote = ""
            escaped = letter == "\\" and not escaped
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in ")}]")
        if not quote and depth == 0:
            return place + 1
    return cut + 1 if cut else None
