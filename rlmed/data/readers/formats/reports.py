"""Read reports from a table: image or images, the report, perhaps the indication, one a row.

The table is CSV, TSV or parquet; docs/data.md lists its columns. What is asked is the row's own
question, or the same for all rows, followed by the row's indication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rlmed.data.examples import BadRowError
from rlmed.data.images import BadImageError
from rlmed.data.readers.base import Option, Reader, Skipped, SourceRow
from rlmed.data.readers.formats.csv_table import table_files
from rlmed.data.readers.formats.huggingface import FILES, parquet_files, split_name, stored_images
from rlmed.data.readers.formats.image_files import images_of, open_images
from rlmed.data.readers.formats.parquet_rows import ParquetTable
from rlmed.data.readers.formats.table import (
    IMAGES,
    SPLIT,
    WITHOUT_IMAGES,
    Columns,
    ImagesOf,
    Record,
    as_text,
    column_option,
    file_split,
    named_images,
    no_images,
    parse_columns,
)
from rlmed.data.readers.formats.text_table import TableRow, read_table

NAMES: Mapping[str, tuple[str, ...]] = {
    "report": ("report", "findings", "impression"),
    "indication": ("indication", "clinical_indication", "history"),
}
"""Column names without --column; the first present one counts, in any case."""
COLUMNS = ("id", "image", "images", "report", "indication", "question", "modality", "kind", "split")
QUESTION = "What would the report of this image say?"
QUESTION_OF_SEVERAL = "What would the report of these images say?"


class _Table(NamedTuple):
    columns: Columns
    texts: Mapping[str, str]
    """Columns of report and indication."""
    split: str
    images: ImagesOf
    records: Iterator[tuple[str, str, Record | Skipped]]
    """Where each record is, its default id and its values, or why it cannot be read."""


def read(
    source: Path,
    *,
    column: Sequence[str] = (),
    question: str | None = None,
    images: Path | None = None,
    split: str | None = None,
    without_images: bool = False,
) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of a table, or of all tables of a folder in name order.

    Raises:
        ValueError: for a source without tables, or a table that lacks columns.
    """
    given = parse_columns(column, COLUMNS)
    parquet = source.suffix == ".parquet" or (source.is_dir() and next(source.glob(FILES), None) is not None)
    for table in (_parquet if parquet else _texts)(source, given, images, without_images):
        for where, default_id, record in table.records:
            if isinstance(record, Skipped):
                yield record
            else:
                yield _row(table, record, where, default_id, split, question)


def _texts(source: Path, given: Mapping[str, str], images: Path | None, without_images: bool) -> Iterator[_Table]:
    for path in table_files(source):
        header, rows = read_table(path)
        columns, texts = _columns(path.name, header, given, without_images)
        found = no_images if without_images else named_images(columns, open_images(images or path.parent, search=False))
        yield _Table(columns, texts, file_split(path), found, _text_records(path, rows))


def _text_records(path: Path, rows: Iterator[TableRow]) -> Iterator[tuple[str, str, Record | Skipped]]:
    for row in rows:
        where, row_id = f"line {row.line} of {path.name}", f"{file_split(path)}-{row.line}"
        yield where, row_id, Skipped(where, row_id, row.reason, chosen=row.blank) if row.reason else row.record


def _parquet(source: Path, given: Mapping[str, str], images: Path | None, without_images: bool) -> Iterator[_Table]:
    root, paths = parquet_files(source, FILES, None)
    for path in paths:
        table, name = ParquetTable(path), path.relative_to(root)
        columns, texts = _columns(path.name, table.columns, given, without_images)
        found = no_images if without_images else stored_images(columns, images_of(images, root))
        used = dict.fromkeys([*columns.used(images=not without_images), *texts.values()])
        yield _Table(columns, texts, split_name(name), found, _parquet_records(table, name, list(used)))


def _parquet_records(
    table: ParquetTable, name: Path, used: Sequence[str]
) -> Iterator[tuple[str, str, Record | Skipped]]:
    for number, record in table.rows(used):
        yield f"row {number} of {name.as_posix()}", f"{file_split(Path('_'.join(name.parts)))}-{number}", record


def _columns(
    table: str, header: Sequence[str], given: Mapping[str, str], without_images: bool
) -> tuple[Columns, dict[str, str]]:
    """Return the columns of a table, those of report and indication apart.

    Raises:
        ValueError: for one that is missing.
    """
    usual = {field: name for field, name in given.items() if field not in NAMES}
    columns = Columns.find(table, header, usual, required=() if without_images else ("image",), options_required=False)
    lowered = {name.strip().lower(): name for name in reversed(header)}
    texts = {field: lowered[name] for field, names in NAMES.items() for name in reversed(names) if name in lowered}
    texts |= {field: name for field, name in given.items() if field in NAMES}
    if absent := [f"{field}={name}" for field, name in texts.items() if name not in header]:
        raise ValueError(f"{table} has no column for --column {', '.join(absent)}; its columns: {', '.join(header)}")
    if "report" not in texts:
        raise ValueError(
            f"{table} has no column for report: name it with --column report=NAME. Its columns: {', '.join(header)}"
        )
    return columns, texts


def _row(
    table: _Table, record: Record, where: str, default_id: str, split: str | None, question: str | None
) -> SourceRow | Skipped:
    row_id = default_id
    columns = table.columns
    try:
        row_id = columns.text(record, "id") or default_id
        shown = tuple(table.images(record))
        indication = as_text(record.get(table.texts.get("indication", "")), "indication")
        asked = columns.text(record, "question") or question or (QUESTION_OF_SEVERAL if len(shown) > 1 else QUESTION)
        return SourceRow(
            where=where,
            split=columns.text(record, "split") or split or table.split,
            id=row_id,
            question=f"{asked}\nIndication: {indication}" if indication else asked,
            options=(),
            answer=_references(record[table.texts["report"]]),
            image=shown[0] if shown else None,
            modality=columns.text(record, "modality"),
            kind=columns.text(record, "kind"),
            more_images=shown[1:],
            task="report",
        )
    except (BadRowError, BadImageError) as error:
        return Skipped(where, row_id, str(error))


def _references(value: object) -> str | list[str]:
    """Return a report, or several if the cell is a list. Raises BadRowError without one."""
    texts = [as_text(entry, "report") for entry in (value if isinstance(value, list) else [value])]
    if not texts or not all(texts):
        raise BadRowError("it has no report")
    return texts if len(texts) > 1 else texts[0]


READER = Reader(
    name="reports",
    title="a CSV, TSV or parquet table of images and reports",
    read=read,
    options=(
        column_option(", ".join(COLUMNS)),
        Option("--question", {"metavar": "TEXT", "help": f"of rows without one of their own (default: {QUESTION})"}),
        IMAGES,
        SPLIT,
        WITHOUT_IMAGES,
    ),
)
