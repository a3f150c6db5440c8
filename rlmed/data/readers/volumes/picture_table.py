"""Read a table of questions about files of pictures: DICOM series, NIfTI volumes, PNG and the like.

A row may ask about several: slices of its file, or several files in one cell.

File names and headers may name patients, so no output or message quotes either: rows go by their
line in the table, pictures by a running number. Nor does any quote cells that choose a picture,
into which a name may have slipped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from PIL import Image

from rlmed.core.files.near_paths import Folder, near_path
from rlmed.data.examples import BadRowError, path_inside
from rlmed.data.images import BadImageError
from rlmed.data.readers.base import Option, Picture, Skipped, SourceRow
from rlmed.data.readers.formats.csv_table import ENDINGS
from rlmed.data.readers.formats.table import (
    ANSWER_INDEX,
    FIELDS,
    OPTION_FIELDS,
    SPLIT,
    Columns,
    Record,
    as_text,
    column_option,
    parse_columns,
)
from rlmed.data.readers.formats.text_table import read_table
from rlmed.data.readers.volumes.display import Window, parse_window
from rlmed.data.readers.volumes.slices import SLICES

TABLE = "questions.csv"
"""Default table in the source's folder; --questions overrides it."""
SPLIT_NAME = "questions"
"""Split of rows whose table has no split column; not the table's name, which may be a patient's."""
QUESTIONS = Option(
    "--questions", {"type": Path, "metavar": "FILE", "help": f"the table of questions (default: {TABLE} in the source)"}
)
WINDOW = Option(
    "--window",
    {
        "nargs": 2,
        "type": float,
        "metavar": ("CENTER", "WIDTH"),
        "help": "values shown, from black to white, for rows with a blank window column; "
        "for CT in Hounsfield units: 40 400 is soft tissue",
    },
)


def table_options(extra: Sequence[str]) -> tuple[Option, ...]:
    """Return the options of a reader whose tables may have these further columns."""
    column = column_option(f"{', '.join(_fields(extra))}, option_a to option_j")
    return (QUESTIONS, column, ANSWER_INDEX, SPLIT, WINDOW, SLICES)


def _fields(extra: Sequence[str]) -> tuple[str, ...]:
    """Return what `--column` may name: images are called files here, and ids are not read."""
    return ("file", "files", *extra, *(field for field in FIELDS if field not in ("id", "image", "images")))


class TableOptions(TypedDict, total=False):
    """What `read_picture_table` takes of the command line."""

    questions: Path | None
    column: Sequence[str]
    answer_index: int | None
    split: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of file, and the columns that choose a picture in one.

    Example:
        >>> FileKind("a DICOM file", ("frame", "slices", "window")).name
        'a DICOM file'
    """

    name: str
    """For messages, with its article."""
    columns: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PictureChoice:
    """A picture of a file that a row of the table asks for.

    Example:
        PictureChoice(content=("17", "40 400"), load=…, modality="CT")
    """

    content: tuple[object, ...]
    """Tells this picture from others of its file; rows with equal contents share one picture."""
    load: Callable[[], Image.Image]
    """Returns the picture. Raises BadImageError."""
    modality: str = ""
    """For rows whose table does not say."""
    file: Path | None = None
    """Where the row names a folder, the file in it."""
    name: str = ""
    """Which of several it is, for messages: "slice 17"."""
    kind: FileKind | None = None
    """Of its file, for tables with several kinds; None takes any column."""


Choose = Callable[[Path, Mapping[str, str]], Sequence[PictureChoice]]
"""`choose(file, cells)`, with a cell per extra column; one picture or more, in order.

Raises BadRowError, BadImageError.
"""


def read_picture_table(
    source: Path,
    choose: Choose,
    extra: Sequence[str],
    *,
    questions: Path | None = None,
    column: Sequence[str] = (),
    answer_index: int | None = None,
    split: str | None = None,
    folders: bool = False,
) -> Iterator[SourceRow | Skipped]:
    """Yield a row or a skip for each line of the table.

    Args:
        source: folder that must contain the files, or the table in it.
        choose: finds what a row asks for in its file.
        extra: further columns that `choose` needs; a table may lack them.
        questions: the table; None takes `TABLE` in the source.
        column: as `table.parse_columns` takes them.
        answer_index: as `table.Columns.find` takes it.
        split: of rows whose table has no split column; None takes `SPLIT_NAME`.
        folders: rows may name folders too.

    Raises:
        ValueError: for a source that is not a folder, or a table that lacks columns.
    """
    folder, table = _folder_and_table(source, questions)
    header, rows = read_table(table)
    columns, cells = _columns(header, column, answer_index, extra)
    finder = _Finder(columns, cells, Folder(folder), folders, choose)
    for row in rows:
        where, row_id = f"line {row.line} of the table", f"line-{row.line}"
        if row.reason:
            yield Skipped(where, row_id, row.reason, chosen=row.blank)
            continue
        try:
            pictures, modality = finder.pictures(row.record)
        except BadRowError as error:
            yield Skipped(where, row_id, str(error))
            continue
        except BadImageError as error:
            yield Skipped(where, row_id, f"its file cannot be used: {error}")
            continue
        entry = columns.row(
            row.record,
            where=where,
            default_id=row_id,
            default_split=split or SPLIT_NAME,
            images=_always(pictures),
        )
        if isinstance(entry, SourceRow) and not entry.modality:
            entry = dataclasses.replace(entry, modality=modality)
        yield entry


def _folder_and_table(source: Path, questions: Path | None) -> tuple[Path, Path]:
    """Return the folder of the files, and the table.

    Raises:
        ValueError: for a source that is neither.
    """
    folder = folder_of(source)
    if not folder.is_dir():
        raise ValueError(
            f"--source {source} must be a folder with the files and {TABLE}, or the table among them: "
            f"{near_path(source) or 'give its path'}"
        )
    if folder != source and questions:
        raise ValueError(f"--source {source} is a table, and --questions names one, too: give the folder as --source")
    return folder, questions or (source if folder != source else source / TABLE)


def folder_of(source: Path) -> Path:
    """Return the folder of the files: the source, or the one that the source is a table of."""
    return source.parent if source.suffix.lower() in ENDINGS and source.is_file() else source


def _columns(
    header: Sequence[str], column: Sequence[str], answer_index: int | None, extra: Sequence[str]
) -> tuple[Columns, dict[str, str]]:
    """Find the columns of a table, and those of `extra` that it has.

    The column of ids is not read: one may be a patient's.
    """
    # the fields image and images are called file and files in the docs of these readers
    column = [re.sub(r"^\s*image(s?)\s*=", r"file\1=", entry) for entry in column]
    given = parse_columns(column, (*_fields(extra), *OPTION_FIELDS))
    renamed = {re.sub(r"^file(s?)$", r"image\1", field): name for field, name in given.items() if field not in extra}
    columns = Columns.find("the table", header, renamed, answer_index=answer_index)
    lowered = {name.strip().lower(): name for name in reversed(header)}
    cells = {name: given.get(name) or lowered[name] for name in extra if name in given or name in lowered}
    if absent := [f"{field}={name}" for field, name in cells.items() if name not in header]:
        raise ValueError(
            f"the table has no column for --column {', '.join(absent)}; its columns: {', '.join(header[:30])}"
        )
    names = {field: name for field, name in columns.names.items() if field != "id"}
    return dataclasses.replace(columns, names=names), cells


def cell_number(cells: Mapping[str, str], name: str) -> int | None:
    """Return the integer in a cell; None if the cell is blank or the column missing.

    Raises:
        BadRowError: for anything else.
    """
    text = cells.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise BadRowError(f"its {name} must be a whole number, or blank")
    return int(text)


def cell_window(cells: Mapping[str, str], default: Sequence[float] | None) -> Window | None:
    """Return the row's window, else the command line's.

    Raises:
        BadRowError: for an invalid window.
    """
    try:
        own = parse_window(cells.get("window", "")[:100])
    except ValueError:
        raise BadRowError(
            "its window must be two numbers, center and positive width, like '40 400', or blank"
        ) from None
    return own if own is not None or default is None else Window(*default)


class _Keys:
    """Running numbers by content, from 1; keeps only digests, so many rows need little memory."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def number(self, *content: object) -> str:
        digest = hashlib.sha256(repr(content).encode("utf-8", "surrogateescape")).digest()[:16]
        return f"{self._numbers.setdefault(digest, len(self._numbers) + 1):06d}"


@dataclasses.dataclass(frozen=True)
class _Finder:
    """Finds the pictures of a record."""

    columns: Columns
    cells: Mapping[str, str]
    """Column by name, of those that `choose` needs."""
    root: Folder
    folders: bool
    choose: Choose
    keys: _Keys = dataclasses.field(default_factory=_Keys)

    def pictures(self, record: Record) -> tuple[list[Picture], str]:
        """Return a record's pictures in order, and their modality by the first file that says."""
        chosen = {name: as_text(record.get(cell), name) for name, cell in self.cells.items()}
        pictures: list[Picture] = []
        modality = ""
        kinds: list[FileKind] = []
        for text in self.columns.image_values(record) or [""]:
            path = _file(as_text(text, "file"), self.root, self.folders)
            choices = self.choose(path, chosen)
            pictures += [_picture(self.keys, path, choice) for choice in choices]
            modality = modality or choices[0].modality
            kinds += [kind for choice in choices[:1] if (kind := choice.kind)]
        for name, text in chosen.items():
            if text and kinds and not any(name in kind.columns for kind in kinds):
                raise BadRowError(_unread(name, kinds))
        return pictures, modality


def _unread(column: str, kinds: Sequence[FileKind]) -> str:
    """Say that a row's cell has no effect on files of these kinds."""
    shown = {kind.name: ", ".join(kind.columns) or "none of these columns" for kind in kinds}
    takes = "; ".join(f"{name} has {columns}" for name, columns in shown.items())
    return f"its {column} has no effect on {' or '.join(shown)}: leave it blank ({takes})"


def _file(text: str, root: Folder, folders: bool) -> Path:
    try:
        path = path_inside(text, root, "file")
    except BadRowError:
        raise BadRowError(f"its file is not a path inside the source's folder: {_advice(text, root)}") from None
    if os.path.isfile(path) or (folders and text and os.path.isdir(path)):
        return path
    # a named pipe would block the reader
    what = "is missing" if folders else "is missing, or is a folder"
    raise BadRowError(f"its file {what}: {_advice(text, root)}")


def _advice(text: str, root: Folder) -> str:
    """Say what to do about a path, and how it differs from an existing file, naming neither."""
    near = root.near(text)
    hint = "" if near is None else f"there is one {near.difference or 'of that name'}; "
    return f"{hint}give its path relative to the source's folder"


def _picture(keys: _Keys, path: Path, choice: PictureChoice) -> Picture:
    def load() -> Image.Image:
        try:
            return choice.load()
        except BadImageError as error:
            which = f"{choice.name} of its file" if choice.name else "its file"
            raise BadImageError(f"{which} cannot be used: {error}") from None

    return Picture(keys.number(choice.file or path, *choice.content), load)


def _always(pictures: Sequence[Picture]) -> Callable[[Record], Sequence[Picture]]:
    return lambda record: pictures
