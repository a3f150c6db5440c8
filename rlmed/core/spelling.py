"""Texts of messages: the name that a misspelled one was meant to be, a value cut short."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 120
"""Most characters of an offending value that a message shows."""


def closest(word: str, names: Iterable[str]) -> str | None:
    """Return the name that `word` was probably meant to be, or None.

    That is the one with the fewest letters inserted, left out, replaced or swapped with their
    neighbours, at most a third of them; among several, the one that begins most alike. Failing
    that, one that shares most of its letters, as a longer name does.

    Example:
        >>> closest("gpro", ["gspo", "grpo", "dapo"])
        'grpo'
    """
    names = list(names)
    ranked = sorted((_edits(word.lower(), name.lower()), -_alike(word, name), name) for name in names)
    if ranked and ranked[0][0] <= max(1, len(word) // 3):
        return ranked[0][2]
    return next(iter(difflib.get_close_matches(word, names, n=1)), None)


def _alike(one: str, other: str) -> int:
    """Return how many letters two words begin with together."""
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def _edits(one: str, other: str) -> int:
    """Return the optimal string alignment distance: no part of a word is edited twice."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, meant in enumerate(other, start=1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != meant)))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == meant:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def shorten(value: object) -> str:
    """Format an offending value for a message: its `repr`, at most 120 characters of it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
