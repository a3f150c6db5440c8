"""Records of CSV and TSV files as people write them: what is wrong with a line costs that line."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rlmed.data.readers.table import Record

DELIMITERS = {",": ",", ";": ";", "tab": "\t", "|": "|"}
"""By what is written on the command line."""
MAX_LINE = 2**24
"""Characters of one line; a file with longer ones is taken for no table."""
_UNDECODED = re.compile("[\udc80-\udcff]")
"""What surrogateescape makes of bytes that are no UTF-8."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """A record of a text table, or why it cannot be read.

    Example:
        TableRow(line=18, record={"image": "17.png", "question": "Which organ?", ...}, reason="")
    """

    line: int
    """In the file, from 1: the first of the record."""
    record: Record
    reason: str


def read_table(path: Path, delimiter: str | None = None) -> tuple[list[str], Iterator[TableRow]]:
    """Header and records of a CSV or TSV file, read as they are asked for; blank lines are left out.

    Args:
        path: UTF-8, with or without a byte-order mark.
        delimiter: a key of `DELIMITERS`; None takes the tab in a .tsv file, else what parts the header into most columns.

    Raises:
        ValueError: for a file that cannot be opened, has no header, or has a line of more than `MAX_LINE` characters.
    """
    if delimiter is not None and delimiter not in DELIMITERS:
        raise ValueError(f"--delimiter {delimiter} is not possible: choose one of {', '.join(DELIMITERS)}")
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.readline(2**16)
    except OSError as error:
        raise ValueError(
            f"table {path} cannot be read: {error.strerror}. Give the path of a CSV or TSV file"
        ) from error
    if not first.strip():
        raise ValueError(f"table {path} is empty or starts with a blank line: its first line must name the columns")
    parts = DELIMITERS[delimiter] if delimiter else _guess(path, first)
    rows = _table_rows(path, parts)
    header = [name.strip() for name in next(rows)[1]]
    if any(_UNDECODED.search(name) for name in header):
        raise ValueError(f"table {path} is not UTF-8: save the table as UTF-8")
    return header, (_table_row(line, cells, header) for line, cells in rows)


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, cells or why there are none) of each row, the header first."""
    # bytes that are no UTF-8 become surrogates, so that they cost their row and not the table
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(_lines(path, file), delimiter=delimiter, strict=True)
        while True:
            line = rows.line_num + 1
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if line == 1:
                    raise ValueError(f"table {path}: its first line cannot be read ({error})") from error
                yield line, f"it cannot be parted into cells ({error}): look for a quotation mark that is not closed"
                continue
            if any(cell.strip() for cell in cells):
                yield line, cells


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ValueError(f"table {path} has a line of more than {MAX_LINE} characters: give a CSV or TSV file")
        yield line


def _table_row(line: int, cells: list[str] | str, header: Sequence[str]) -> TableRow:
    if isinstance(cells, str):
        return TableRow(line, {}, cells)
    if len(cells) != len(header):
        reason = f"it has {len(cells)} cells, and the header has {len(header)}: put texts with delimiters into quotes"
        return TableRow(line, {}, reason)
    if any(_UNDECODED.search(cell) for cell in cells):
        return TableRow(line, {}, "it is not UTF-8: save the table as UTF-8")
    return TableRow(line, dict(zip(header, cells, strict=True)), "")


def _guess(path: Path, header: str) -> str:
    if path.suffix.lower() in (".tsv", ".tab"):
        return "\t"
    return max(",;\t", key=lambda mark: header.count(mark))
