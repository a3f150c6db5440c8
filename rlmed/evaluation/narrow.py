"""Terminal tables that stay readable in narrow terminals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

EMPTY = "–"
LEAST = 6
"""Columns of the terminal that names get, if they need as many."""
WIDEST = 10_000
"""Columns in which any table has room."""
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


class FigureTable(Table):
    """A table of names and figures; a list of "heading: figure" where the figures have no room.

    Example:
        >>> table = FigureTable("Accuracy in %", ["from the options"])
        >>> table.add_rows("file", ["accuracy", "chance\\nprior"], [("test_mri", ["100.0", "7.0\\n33.3"])])
        >>> Console(width=20).print(table)
        Accuracy in %
        test_mri
          accuracy: 100.0
          chance prior: 7.0,
          33.3
        from the options
    """

    def __init__(self, title: str, legend: Sequence[str]) -> None:
        """Start without columns; the legend's lines stand below the table."""
        self._legend = "\n".join(legend)
        super().__init__(
            title=Text(title),
            caption=Text(self._legend, justify="left"),
            # lines between the columns would not leave room for the figures in 80 characters
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        self._headings: list[str] = []
        self._lines: list[tuple[str, list[str]]] = []
        self._ranges: list[tuple[int, int]] = []

    def add_rows(self, label: str, headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Add columns and rows, without the columns that have nothing in any row; call it once.

        Args:
            label: heading of the first column.
            headings: of the others.
            rows: label and cells of each; a cell with nothing to show is `EMPTY`, in each of its
                lines.
        """
        shown = [at for at in range(len(headings)) if any({*cells[at].split("\n")} != {EMPTY} for _, cells in rows)]
        self._headings = [headings[at] for at in shown]
        self._lines = [(name, [cells[at] for at in shown]) for name, cells in rows]
        longest = _longest([label, *(name for name, _ in rows)])
        self._ranges = [(min(longest, LEAST), longest)]
        self.add_column(label)
        for at, heading in enumerate(self._headings):
            self.add_column(heading, justify="right")
            column = [heading, *(cells[at] for _, cells in self._lines)]
            self._ranges.append((_longest(column, split=str.split), _longest(column)))
        for name, cells in self._lines:
            self.add_row(Label(name), *cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, with each figure whole, or else the list."""
        for column, (_, most) in zip(self.columns, self._ranges, strict=True):
            column.width = most
        between = self.__rich_measure__(console, options.update(width=WIDEST)).maximum - sum(
            most for _, most in self._ranges
        )
        widths = fitting(self._ranges, options.max_width - between)
        if widths is None:
            yield from self._list(console, options.max_width)
            return
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)

    def _list(self, console: Console, width: int) -> Iterator[RenderableType]:
        """Yield title, a line per figure below its row's label, and legend."""
        yield self.title or ""
        for name, cells in self._lines:
            if name:
                yield Label(name)
            for heading, cell in zip(self._headings, cells, strict=True):
                if {*(lines := cell.split("\n"))} != {EMPTY}:
                    shown = Text(f"{' '.join(heading.split())}: {', '.join(lines)}")
                    yield from (Text("  ") + line for line in shown.wrap(console, max(1, width - 2)))
        yield Text(self._legend)


def fitting(ranges: Sequence[tuple[int, int]], room: int) -> list[int] | None:
    """Return widths within their ranges whose sum fits, as even as can be; None if nothing fits.

    Example:
        >>> fitting([(2, 30), (5, 12), (3, 4)], 22), fitting([(2, 30), (5, 12)], 6)
        ([9, 9, 4], None)
    """
    for most in range(min(room, max(most for _, most in ranges)), 0, -1):
        widths = [min(max(most, least), longest) for least, longest in ranges]
        if sum(widths) <= room:
            return widths
    return None


def _longest(texts: Sequence[str], split: Callable[[str], list[str]] = str.splitlines) -> int:
    """Return the length of the longest line, or of the longest of other pieces."""
    return max((cell_len(piece) for text in texts for piece in split(text)), default=0)


def _shortened(word: str, width: int) -> str:
    """Return a word with its middle left out if it is too long."""
    if len(word.rstrip()) <= width:
        return word
    end = max(0, (width - 1) // 2)
    return f"{word[: width - 1 - end]}…{word.rstrip()[len(word.rstrip()) - end :]}"
