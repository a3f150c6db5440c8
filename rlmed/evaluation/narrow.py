"""Terminal tables that stay readable in narrow terminals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

EMPTY = "–"
LEAST = 6
"""Columns of the terminal that names get, if they need as many."""
_PIECE = re.compile(r"[^\s_\-./,]*[\s_\-./,]*")


class Label(str):
    """Lines with names of files; broken where words of a name end, not within.

    Example:
        >>> list(Label("vindr_cxr_open_test\\n300 rows").lines(12))
        ['vindr_cxr_', 'open_test', '300 rows']
    """

    __slots__ = ()

    def lines(self, width: int) -> Iterator[str]:
        """Yield lines of at most this many characters; a longer word loses its middle."""
        for text in self.split("\n"):
            line = ""
            for piece in _PIECE.findall(text):
                if line and len((line + piece).rstrip()) > width:
                    yield line.rstrip()
                    line = ""
                line += _shortened(piece, width)
            yield line.rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield the lines as rich prints them."""
        yield Text("\n".join(self.lines(options.max_width)))


def add_rows(table: Table, label: str, headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Add columns and rows to a table, without the columns that have nothing in any row.

    Args:
        table: without columns.
        label: heading of the first column.
        headings: of the others.
        rows: label and cells of each; a cell with nothing to show is `EMPTY`, in each of its lines.
    """
    shown = [at for at in range(len(headings)) if any({*cells[at].split("\n")} != {EMPTY} for _, cells in rows)]
    longest = max((len(line) for name, _ in rows for line in name.split("\n")), default=0)
    table.add_column(label, min_width=min(longest, LEAST))
    for at in shown:
        table.add_column(headings[at], justify="right", overflow="fold")
    for name, cells in rows:
        table.add_row(Label(name), *(cells[at] for at in shown))


def _shortened(word: str, width: int) -> str:
    """Return a word with its middle left out if it is too long."""
    if len(word.rstrip()) <= width:
        return word
    end = max(0, (width - 1) // 2)
    return f"{word[: width - 1 - end]}…{word.rstrip()[len(word.rstrip()) - end :]}"
