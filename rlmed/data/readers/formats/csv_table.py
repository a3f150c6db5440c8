"""Read your own questions from a CSV or TSV table, one per row; docs/data.md lists the columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rlmed.core.files.litter import litter_clause, sift
from rlmed.data.readers.base import Option, Reader, Skipped, SourceRow
from rlmed.data.readers.formats.image_files import open_images
from rlmed.data.readers.formats.table import (
    ANSWER_INDEX,
    COLUMN,
    IMAGES,
    SPLIT,
    WITHOUT_IMAGES,
    Columns,
    file_split,
    named_images,
    no_images,
    parse_columns,
)
from rlmed.data.readers.formats.text_table import DELIMITERS, read_table

ENDINGS = (".csv", ".tsv", ".tab")


def read(
    source: Path,
    *,
    column: Sequence[str] = (),
    delimiter: str | None = None,
    answer_index: int | None = None,
    images: Path | None = None,
    split: str | None = None,
    without_images: bool = False,
) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of a table, or of all tables of a folder in name order.

    Raises:
        ValueError: for a source without tables, or a table that lacks columns.
    """
    given = parse_columns(column)
    required = ("question", "answer") if without_images else ("image", "question", "answer")
    for path in table_files(source):
        header, rows = read_table(path, delimiter)
        columns = Columns.find(path.name, header, given, required=required, answer_index=answer_index)
        found = no_images if without_images else named_images(columns, open_images(images or path.parent, search=False))
        for row in rows:
            where, default_id = f"line {row.line} of {path.name}", f"{file_split(path)}-{row.line}"
            if row.reason:
                yield Skipped(where, default_id, row.reason, chosen=row.blank)
            else:
                yield columns.row(
                    row.record,
                    where=where,
                    default_id=default_id,
                    default_split=split or file_split(path),
                    images=found,
                )


def table_files(source: Path) -> list[Path]:
    """Return the table, or the tables of a folder.

    Raises:
        ValueError: if there are none.
    """
    if not source.is_dir():
        if source.name.startswith("._") and source.with_name(source.name[2:]).is_file():
            raise ValueError(f"{source} is macOS metadata of {source.name[2:]}, not a table: give that one")
        return [source]
    found = (path for path in source.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
    paths, litter = sift(found, source)
    if not paths:
        raise ValueError(
            f"folder {source} holds no table ({', '.join(ENDINGS)}){litter_clause(litter)}: give the path of one"
        )
    return paths


READER = Reader(
    name="csv",
    title="a CSV or TSV table of questions",
    read=read,
    options=(
        COLUMN,
        Option(
            "--delimiter",
            {"choices": tuple(DELIMITERS), "help": "default: the one that splits the header into most columns"},
        ),
        ANSWER_INDEX,
        IMAGES,
        SPLIT,
        WITHOUT_IMAGES,
    ),
)
