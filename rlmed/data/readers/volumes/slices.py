"""Several slices of a volume as the images of one question: `--slices 5` or `--slices 3,10,17`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlmed.data.examples import BadRowError
from rlmed.data.images import MAX_IMAGES, BadImageError
from rlmed.data.readers.base import Option

SLICES = Option(
    "--slices",
    {
        "metavar": "SLICES",
        "help": "slices shown as the images of a question, for rows with a blank slices column: 5 takes five, evenly "
        "chosen; 3,10,17 these, in this order",
    },
)
_FORM = re.compile(r"\d{1,9}(\s*[,;\s]\s*\d{1,9})*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Slices:
    """Which slices of a volume a question shows.

    Example:
        >>> parse_slices("5").indices(40, first=1, kind="slice")
        (4, 12, 20, 28, 36)
        >>> parse_slices("3,10,17").indices(40, first=1, kind="slice")
        (2, 9, 16)
    """

    count: int
    """How many."""
    numbers: tuple[int, ...] = ()
    """As the user counts them, in the order shown; empty for slices evenly chosen."""

    def indices(self, available: int, *, first: int, kind: str) -> tuple[int, ...]:
        """Return the indices, from 0: the middles of `count` equal parts, or those named.

        Args:
            available: slices of the volume.
            first: the user's number of its first slice.
            kind: what messages call a slice.

        Raises:
            BadImageError: for more slices than there are, or a number out of range.
        """
        if self.numbers:
            for number in self.numbers:
                if not first <= number < first + available:
                    raise BadImageError(f"it has no {kind} {number}: give some from {first} to {first + available - 1}")
            return tuple(number - first for number in self.numbers)
        if self.count > available:
            raise BadImageError(f"it has {available} {kind}s, and {self.count} are asked for: ask for fewer")
        return tuple((2 * part + 1) * available // (2 * self.count) for part in range(self.count))


def parse_slices(text: str) -> Slices:
    """Parse `5` (how many) or `3,10,17` (which), parted by commas, semicolons or blanks.

    Raises:
        ValueError: for anything else, a repeated number, none, or more than `MAX_IMAGES`.
    """
    if not _FORM.fullmatch(text.strip()):
        raise ValueError("must be how many, like 5, or which, like 3,10,17")
    numbers = tuple(map(int, re.findall(r"\d+", text)))
    count = numbers[0] if len(numbers) == 1 else len(numbers)
    if not 1 <= count <= MAX_IMAGES:
        raise ValueError(f"must be 1 to {MAX_IMAGES} slices, not {count}")
    if len(set(numbers)) < len(numbers):
        raise ValueError("must not name a slice twice")
    return Slices(count, numbers if len(numbers) > 1 else ())


def given_slices(text: str | None) -> Slices | None:
    """Parse what the command line says; None for nothing.

    Raises:
        ValueError: for invalid slices.
    """
    try:
        return None if text is None else parse_slices(text)
    except ValueError as error:
        raise ValueError(f"--slices {text} {error}") from None


def cell_slices(cells: Mapping[str, str], default: Slices | None, others: Sequence[str]) -> Slices | None:
    """Return a row's slices, else the command line's; None for a single one.

    Args:
        cells: of the row.
        default: the command line's.
        others: columns that choose a single slice, in a row of which `default` does not count.

    Raises:
        BadRowError: for invalid slices, or beside another column's choice.
    """
    text, chosen = cells.get("slices", ""), [name for name in others if cells.get(name)]
    if not text:
        return None if chosen else default
    if chosen:
        raise BadRowError(f"it has both slices and a {chosen[0]}: leave one blank")
    try:
        return parse_slices(text)
    except ValueError as error:
        raise BadRowError(f"its slices {error}, or be blank") from None
