"""Read records of CSV and TSV files as people write them: a defective line costs only that line.

Every non-blank line after the header belongs to exactly one row: alone, or with the lines before it
if a quoted text spans several. An unclosed quotation mark would swallow everything that follows, so
a row of several lines must end as a row does and contain no line that reads like a row of its own.
Otherwise its first line is the bad one, and the lines after that are read by themselves.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rlmed.core.files.near_paths import near_path, visible
from rlmed.data.readers.formats.table import Record

DELIMITERS = {",": ",", ";": ";", "tab": "\t", "|": "|"}
"""Delimiters by their command-line name."""
MAX_LINE = 2**24
"""Most characters of a line; a file with a longer one is not a table."""
MAX_ROW = 2**20
"""Most characters of a multi-line row; bounds the read-ahead for an unclosed quotation mark."""
_UNDECODED = re.compile("[\udc80-\udcff]")
"""What surrogateescape makes of bytes that are not UTF-8."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A record of a text table, or why it cannot be read.

    Example:
        TableRow(line=18, record={"image": "17.png", "question": "Which organ?", ...}, reason="")
    """

    line: int
    """The record's first line in the file, from 1. Lines end with LF, CR or both."""
    record: Record
    reason: str
    blank: bool = False
    """True if the reason is that all cells are empty, as below a spreadsheet's last row."""


def read_table(path: Path, delimiter: str | None = None) -> tuple[list[str], Iterator[TableRow]]:
    """Read header and records of a CSV or TSV file lazily, skipping blank lines.

    Args:
        path: UTF-8, with or without a byte-order mark.
        delimiter: a key of `DELIMITERS`; None takes the tab in a .tsv file, else the one that
            splits the header into most columns.

    Raises:
        ValueError: for a file that cannot be opened, has no header, or has a line of more than
            `MAX_LINE` characters.
    """
    if delimiter is not None and delimiter not in DELIMITERS:
        raise ValueError(f"Invalid --delimiter {delimiter}; expected one of {', '.join(DELIMITERS)}")
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.readline(2**16)
    except OSError as error:
        near = near_path(path) or "give the path of a CSV or TSV file"
        raise ValueError(f"table {path} cannot be read: {error.strerror}; {near}") from error
    if not first.strip():
        raise ValueError(f"table {path} is empty or starts with a blank line: its first line must name the columns")
    parts = DELIMITERS[delimiter] if delimiter else _guess(path, first)
    records = _records(path, parts)
    names = next(records).cells
    header = [visible(name) for name in names]
    if any(_UNDECODED.search(name) or "\0" in name for name in header):
        raise ValueError(f"table {path} is not UTF-8: save the table as UTF-8")
    return header, (_table_row(record, names, header) for record in records)


@dataclass(frozen=True, slots=True)
class _Parted:
    """A row's cells, or why it has none."""

    line: int
    cells: list[str]
    fault: str = ""


def _records(path: Path, delimiter: str) -> Iterator[_Parted]:
    """Yield each row that is not blank, the header first.

    Raises ValueError for an unreadable header.
    """
    # invalid UTF-8 bytes become surrogates, so that they cost their row and not the table
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(path, file)
        style: _Style | None = None
        while True:
            line = lines.begin_row()
            cells, fault = [], ""
            try:
                cells = next(csv.reader(lines, delimiter=delimiter, strict=True))
            except StopIteration:
                return
            except csv.Error as error:
                fault = _explained(str(error), line, len(lines.taken))
            taken = lines.taken
            if style is None:
                style = _Style.of(taken[0], delimiter)
            if not fault and len(taken) > 1 and (further := style.further_row(taken)):
                fault = f"{_open_mark(line)}: line {line + further} reads like a row of its own. {_CLOSE}"
            if fault and line == 1:
                raise ValueError(f"table {path}: its first line cannot be read ({fault})")
            if fault:
                lines.read_again(taken[1:])
            if fault or any(text.strip() for text in taken):
                yield _Parted(line, cells, fault)


class _Lines:
    """The lines of a file; can reread those of a row that went wrong."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._again: deque[str] = deque()
        self._number, self._size = 0, 0
        self.taken: list[str] = []
        """Lines of the current row."""

    def begin_row(self) -> int:
        """Begin a row and return the number of the next line, from 1."""
        self.taken, self._size = [], 0
        return self._number + 1

    def read_again(self, lines: Sequence[str]) -> None:
        """Push back these lines, the last ones read."""
        self._again.extendleft(reversed(lines))
        self._number -= len(lines)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._size > MAX_ROW:
            raise csv.Error("row larger than its limit")
        line = self._again.popleft() if self._again else self._file.readline(MAX_LINE + 1)
        if not line:
            raise StopIteration
        if len(line) > MAX_LINE:
            raise ValueError(
                f"table {self._path} has a line of more than {MAX_LINE} characters: give a CSV or TSV file"
            )
        self.taken.append(line)
        self._number, self._size = self._number + 1, self._size + len(line)
        return line


@dataclass(frozen=True, slots=True)
class _Style:
    """What the header tells of the lines: cell count, and whether blanks follow delimiters."""

    delimiter: str
    cells: int
    spaced: bool

    @classmethod
    def of(cls, header: str, delimiter: str) -> _Style:
        cells = _parted(header, delimiter)
        cells = cells[:-1] + cells[-1].split(delimiter)  # an opening mark that is not closed
        return cls(delimiter, len(cells), any(cell.startswith(" ") for cell in cells[1:]))

    def further_row(self, lines: Sequence[str]) -> int:
        """Return which line after the first, from 1, in a quoted text reads like a row; else 0."""
        for index, line in enumerate(lines[1:-1], start=1):
            try:
                cells = next(csv.reader([line], delimiter=self.delimiter, strict=True))
            except csv.Error:
                continue
            # a mark at the end of a cell closes a text opened in an earlier line
            if self._fits(cells) and not any(cell.endswith('"') for cell in cells):
                return index
        # the last line always ends a row; with its text's commas it is a row by itself only if the
        # first one is, too
        first, last = _parted(lines[0], self.delimiter), _parted(f'"{lines[-1]}', self.delimiter)
        both = (first[:-1] + first[-1].split(self.delimiter), last[0].split(self.delimiter) + last[1:])
        return len(lines) - 1 if all(map(self._fits, both)) else 0

    def _fits(self, cells: Sequence[str]) -> bool:
        # prose has a blank after each comma, and tables don't
        return len(cells) == self.cells > 1 and (self.spaced or not any(cell.startswith(" ") for cell in cells[1:]))


def _parted(line: str, delimiter: str) -> list[str]:
    """Split a single line into cells; an unclosed quoted text runs to its end."""
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:  # an overlong cell
        return [line]


_CLOSE = "Close it; the lines after it were read as rows of their own"


def _open_mark(line: int) -> str:
    return f"the quotation mark that opens in line {line} is not closed"


def _explained(error: str, line: int, lines: int) -> str:
    """Explain an error of the csv module about a row of so many lines."""
    if "end of data" in error:
        return f"{_open_mark(line)} up to the end of the table. {_CLOSE if lines > 1 else 'Close it'}"
    if "limit" in error:
        limit = f"{csv.field_size_limit()} characters, the field limit"
        return f"it has a cell of more than {limit}" if lines == 1 else f"{_open_mark(line)} within {limit}. {_CLOSE}"
    if lines > 1:
        return f"{_open_mark(line)}: text follows the next one, in line {line + lines - 1}. {_CLOSE}"
    return 'text follows a closing quotation mark: write "" for a mark within a text in quotation marks'


def _table_row(row: _Parted, names: Sequence[str], header: Sequence[str]) -> TableRow:
    cells = row.cells
    if row.fault:
        return TableRow(row.line, {}, row.fault)
    if not any(cell.strip() for cell in cells):
        return TableRow(row.line, {}, "all its cells are empty", blank=True)
    if len(cells) != len(header):
        advice = (
            "put texts with delimiters into quotes" if len(cells) > len(header) else "it is cut, or cells are missing"
        )
        reason = f"it has {len(cells)} cells, and the header has {len(header)}: {advice}"
        return TableRow(row.line, {}, reason)
    if any(_UNDECODED.search(cell) for cell in cells):
        return TableRow(row.line, {}, "it is not UTF-8: save the table as UTF-8")
    if cells == names:
        return TableRow(row.line, {}, "it repeats the names of the columns: remove the line")
    return TableRow(row.line, dict(zip(header, cells, strict=True)), "")


def _guess(path: Path, header: str) -> str:
    if path.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    return max(",;\t", key=lambda mark: header.count(mark))
