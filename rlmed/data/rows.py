"""Reasons why a row cannot be used, and how messages put many of them together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlmed.core.spelling import shorten as shorten

_VALUES = re.compile(r"\[.*\]|\{.*\}|'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\S+\.\w{1,5}\b|-?\d[\d.,]*")
"""What differs between two rows with the same fault: quoted values, paths, files, numbers."""


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
        kinds.setdefault(_VALUES.sub("…", reason), []).append((where, reason))
    ordered = sorted(kinds.values(), key=len, reverse=True)  # stable: then in the order of the rows
    return [f"{f'{len(rows)} rows, such as ' if len(rows) > 1 else ''}{rows[0][0]}: {rows[0][1]}" for rows in ordered]
