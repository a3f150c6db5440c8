"""Questions in a table about files of which each holds many pictures: DICOM series and NIfTI volumes.

Names of files, and what their headers say, may be those of patients. So nothing that is written or said quotes either:
rows are named by their line in the table, pictures by a running number. Nor are cells that choose a picture quoted, into
which a name may have slipped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from rlmed.core.near_paths import Folder, near_path
from rlmed.data.images import BadImageError
from rlmed.data.jsonl import BadRowError, path_inside
from rlmed.data.readers.base import Option, Picture, Skipped, SourceRow
from rlmed.data.readers.display import Window, parse_window
from rlmed.data.readers.table import Columns, Record, as_text, parse_columns
from rlmed.data.readers.text_table import read_table

TABLE = "questions.csv"
"""In the source's folder, where --questions names no other."""
SPLIT_NAME = "questions"
"""Of rows whose table has no split column; not the table's own name, which may be a patient's."""
QUESTIONS = Option(
    "--questions", {"type": Path, "metavar": "FILE", "help": f"the table of questions (default: {TABLE} in the source)"}
)
WINDOW = Option(
    "--window",
    {
        "nargs": 2,
        "type": float,
        "metavar": ("CENTER", "WIDTH"),
        "help": "values shown, from black to white, of rows whose window column says nothing; "
        "for CT in Hounsfield units: 40 400 is soft tissue",
    },
)


@dataclasses.dataclass(frozen=True, slots=True)
class PictureChoice:
    """What a row of the table asks to be shown of a file.

    Example:
        PictureChoice(content=("17", "40 400"), load=…, modality="CT")
    """

    content: tuple[object, ...]
    """What tells this picture from others of the same file; two rows with equal contents share one picture."""
    load: Callable[[], Image.Image]
    """Raises BadImageError."""
    modality: str = ""
    """For rows whose table says nothing of it."""


Choose = Callable[[Path, Mapping[str, str]], PictureChoice]
"""`choose(file, cells)` with a cell for each extra column. Raises BadRowError, BadImageError."""


def read_picture_table(
    source: Path,
    choose: Choose,
    extra: Sequence[str],
    *,
    questions: Path | None,
    column: Sequence[str],
    answer_index: int | None,
    split: str | None,
) -> Iterator[SourceRow | Skipped]:
    """A row or a skip for each line of the table.

    Args:
        source: folder that holds the files, and below which they must lie.
        choose: finds what a row asks for in its file.
        extra: columns besides those of every table that `choose` needs; a table may lack them.
        questions: the table; None takes `TABLE` in the source.
        column: as `table.parse_columns` takes them.
        answer_index: as `table.Columns.find` takes it.
        split: of rows whose table has no split column; None takes `SPLIT_NAME`.

    Raises:
        ValueError: for a source that is no folder, or a table without its columns.
    """
    if not source.is_dir():
        raise ValueError(
            f"--source {source} must be a folder with the files and {TABLE}: {near_path(source) or 'give its path'}"
        )
    table = questions or source / TABLE
    header, rows = read_table(table)
    columns = Columns.find("the table", header, parse_columns(column), answer_index=answer_index)
    # an id of the user's may be a patient's
    columns = dataclasses.replace(
        columns, names={field: name for field, name in columns.names.items() if field != "id"}
    )
    lowered = {name.lower(): name for name in header}
    cells = {name: lowered[name] for name in extra if name in lowered}
    root, keys = Folder(source), _Keys()
    for row in rows:
        where, row_id = f"line {row.line} of the table", f"line-{row.line}"
        if row.reason:
            yield Skipped(where, row_id, row.reason, chosen=row.blank)
            continue
        try:
            path = _file(columns.text(row.record, "image"), root)
            choice = choose(path, {name: as_text(row.record.get(cell), name) for name, cell in cells.items()})
            picture = Picture(keys.number(path, *choice.content), _of_the_file(choice.load))
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
            image=_always(picture),
        )
        if isinstance(entry, SourceRow) and not entry.modality:
            entry = dataclasses.replace(entry, modality=choice.modality)
        yield entry


def cell_number(cells: Mapping[str, str], name: str) -> int | None:
    """The whole number in a cell; None where the cell is blank or the table has no such column.

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
    """The window that a row asks for, else the one of the command line.

    Raises:
        BadRowError: for a cell that is no window.
    """
    try:
        own = parse_window(cells.get("window", "")[:100])
    except ValueError:
        raise BadRowError(
            "its window must be two numbers, center and positive width, like '40 400', or blank"
        ) from None
    return own if own is not None or default is None else Window(*default)


class _Keys:
    """Running numbers by content, from 1; a digest is kept, so that many rows need little memory."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def number(self, *content: object) -> str:
        digest = hashlib.sha256(repr(content).encode("utf-8", "surrogateescape")).digest()[:16]
        return f"{self._numbers.setdefault(digest, len(self._numbers) + 1):06d}"


def _file(text: str, root: Folder) -> Path:
    try:
        path = path_inside(text, root, "file")
    except BadRowError:
        raise BadRowError(f"its file is no path inside of the source's folder: {_cure(text, root)}") from None
    if not os.path.isfile(path):  # a named pipe would keep the reader waiting
        raise BadRowError(f"its file is missing, or is a folder: {_cure(text, root)}")
    return path


def _cure(text: str, root: Folder) -> str:
    """What to do about a path, and how it differs from a file that there is, without the name of either."""
    near = root.near(text)
    hint = "" if near is None else f"there is one {near.difference or 'of that name'}; "
    return f"{hint}give its path from the source's folder on"


def _of_the_file(load: Callable[[], Image.Image]) -> Callable[[], Image.Image]:
    def named() -> Image.Image:
        try:
            return load()
        except BadImageError as error:
            raise BadImageError(f"its file cannot be used: {error}") from None

    return named


def _always(picture: Picture) -> Callable[[Record], Picture]:
    return lambda record: picture
