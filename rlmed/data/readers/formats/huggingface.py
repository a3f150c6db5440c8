"""Read the Hugging Face hub's parquet files: from a local folder, or a data set by name.

Images are in the files (`datasets`' Image feature, or bytes) or named by path. Questions with an
answer but no options get options from `rlmed.data.readers.options`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmed.core.files.litter import litter_clause, sift
from rlmed.core.files.near_paths import near_path
from rlmed.data.examples import BadRowError, image_name, shorten
from rlmed.data.images import BadImageError
from rlmed.data.options.choices import written_answer
from rlmed.data.readers.base import Encoded, Option, Reader, Skipped, SourceImage, SourceRow
from rlmed.data.readers.formats.image_files import MAX_MEMBER_BYTES, Images, images_of
from rlmed.data.readers.formats.parquet_rows import ParquetTable
from rlmed.data.readers.formats.table import (
    ANSWER_INDEX,
    COLUMN,
    IMAGES,
    NO_IMAGE,
    SPLIT,
    WITHOUT_IMAGES,
    Columns,
    ImagesOf,
    Record,
    file_split,
    no_images,
    parse_columns,
)
from rlmed.data.readers.options import (
    DISTRACTOR_COUNT,
    DISTRACTORS,
    LEFT_OUT,
    OPEN,
    SEED,
    YES_NO,
    AnswerPool,
    open_answer,
    plain_answer,
)

FILES = "**/*.parquet"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")
"""The suffix after the split in the name of a sharded file."""
_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg"}
"""Suffix by first bytes, for images without a name."""


def read(
    source: Path,
    *,
    column: Sequence[str] = (),
    answer_index: int | None = None,
    files: str = FILES,
    revision: str | None = None,
    split: str | None = None,
    images: Path | None = None,
    without_images: bool = False,
    open: str = "distractors",
    distractors: int = DISTRACTORS,
    seed: int = 0,
) -> Iterator[SourceRow | Skipped]:
    """Yield rows file by file, in path order.

    Raises:
        ValueError: for a source without parquet files, a failed download, or files that lack
            columns.
    """
    root, paths = parquet_files(source, files, revision)
    given = parse_columns(column)
    required = ("question", "answer") if without_images else ("image", "question", "answer")
    tables = [(path, ParquetTable(path)) for path in paths]
    found = [
        Columns.find(
            path.name, table.columns, given, required=required, answer_index=answer_index, options_required=False
        )
        for path, table in tables
    ]
    if (open, distractors, seed) != ("distractors", DISTRACTORS, 0) and all(columns.has_options for columns in found):
        raise ValueError(
            "--open, --distractors and --seed are for tables without options, and this one has some: leave them out"
        )
    pool = AnswerPool(seed, distractors)
    for (_, table), columns in zip(tables, found, strict=True):
        if not columns.has_options:
            _fill(pool, table, columns)
    folder = None if without_images else images_of(images, root)
    numbers: Counter[str] = Counter()
    for (path, table), columns in zip(tables, found, strict=True):
        name = split or split_name(path.relative_to(root))
        found_images = no_images if folder is None else stored_images(columns, folder)
        for number, record in table.rows(columns.used(images=not without_images)):
            where = f"row {number} of {path.relative_to(root).as_posix()}"
            default_id = f"{name}-{numbers[name]}"
            numbers[name] += 1
            row = columns.row(record, where=where, default_id=default_id, default_split=name, images=found_images)
            if isinstance(row, SourceRow) and not columns.has_options:
                row = _with_options(row, pool, open)
            yield row


def parquet_files(source: Path, pattern: str, revision: str | None) -> tuple[Path, list[Path]]:
    """Return the folder that paths are relative to, and its parquet files in path order.

    Raises:
        ValueError: if there are none, or the download fails.
    """
    if revision is not None and source.exists():
        raise ValueError(f"--revision {revision} is for data sets on the hub, and {source} is local: leave it out")
    if source.is_file():
        if pattern != FILES:
            raise ValueError(f"--files {pattern} chooses among files, and {source} is one: leave it out")
        return source.parent, [source]
    root = source if source.is_dir() else fetch(source, pattern, revision)
    try:
        paths, litter = sift((path for path in root.glob(pattern) if path.is_file()), root)
    except (ValueError, NotImplementedError) as error:  # an empty or absolute pattern
        raise ValueError(f"--files {pattern!r}: give a pattern relative to the source, like {FILES}") from error
    if not paths:
        raise ValueError(
            f"{source} holds no parquet files ({pattern}){litter_clause(litter)}. Of a data set on the hub try --revision "
            "refs/convert/parquet; of one that datasets saved to disk, write to_parquet('train.parquet')"
        )
    return root, paths


def fetch(source: Path, pattern: str, revision: str | None) -> Path:
    """Download the parquet files of data set `source` from the hub; return their cache folder.

    Raises:
        ValueError: if the name is invalid, the hub is unreachable, or the data set is not found.
    """
    # installed with transformers; imported late, since a local folder does not need it
    from huggingface_hub import snapshot_download

    name = source.as_posix()
    if not _HUB_NAME.fullmatch(name):
        near = near_path(source)
        raise ValueError(f"{name} is neither a local path nor the name of a data set (OWNER/NAME){near and ': '}{near}")
    try:
        return Path(
            snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=[pattern, pattern.removeprefix("**/")]
            )
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data set {name} is not a local folder and cannot be fetched from the hub: {str(error).splitlines()[0]}. "
            f"Download it where there is a network (hf download {name} --repo-type dataset --local-dir {source.name}) and "
            f"pass --source {source.name}"
        ) from error


def split_name(path: Path) -> str:
    """Return the split of a file's rows.

    Example:
        >>> [split_name(Path(p)) for p in ("data/train-00000-of-00003.parquet", "default/test/0000.parquet", "mri.parquet")]
        ['train', 'test', 'mri']
    """
    if path.stem.isdigit() and path.parent.name:
        return file_split(Path(path.parent.name))
    return file_split(Path(_SHARD.sub("", path.stem) + ".parquet"))


def _fill(pool: AnswerPool, table: ParquetTable, columns: Columns) -> None:
    """Add the answers of a file to the pool, without reading its images."""
    for _, record in table.rows(columns.used(images=False)):
        try:
            pool.add(columns.text(record, "kind"), plain_answer(columns.text(record, "answer")))
        except BadRowError:
            continue  # reported when the row is read


def _with_options(row: SourceRow, pool: AnswerPool, open_answers: str) -> SourceRow | Skipped:
    assert isinstance(row.answer, str)
    answer = plain_answer(row.answer)
    if answer not in YES_NO and open_answers == "skip":
        return Skipped(row.where, row.id, LEFT_OUT, chosen=True)
    try:
        if open_answer(answer, open_answers):
            return dataclasses.replace(row, answer=answer, task="open")
        options = pool.options(row.id, row.kind, answer)
        return dataclasses.replace(row, options=options, answer=written_answer(options, options.index(answer)))
    except BadRowError as error:
        return Skipped(row.where, row.id, str(error))


def stored_images(columns: Columns, folder: Images) -> ImagesOf:
    """Return an `ImagesOf` for columns that store images or their paths."""

    def find(record: Record) -> list[SourceImage]:
        values = columns.image_values(record)
        if not values:
            raise BadRowError(NO_IMAGE)
        names = [image_name(number, len(values)) for number in range(1, len(values) + 1)]
        return [_image(value, name, folder) for value, name in zip(values, names, strict=True)]

    return find


def _image(value: Any, name: str, folder: Images) -> SourceImage:
    """Return an image that a column stores, or names by its path; `name` is for messages."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if isinstance(content, bytes):
        return _encoded(content, path)
    text = path if content is None else content
    if text in (None, ""):
        raise BadRowError(NO_IMAGE if name == "image" else f"its {name} is missing")
    if not isinstance(text, str):
        raise BadRowError(f"its {name} is {shorten(text)}, neither bytes nor a path")
    return folder.find(text)


def _encoded(content: bytes, name: Any) -> Encoded:
    if len(content) > MAX_MEMBER_BYTES:
        raise BadImageError(f"its image has {len(content)} bytes, more than {MAX_MEMBER_BYTES}")
    ending = next((ending for start, ending in _ENDINGS.items() if content.startswith(start)), "")
    return Encoded(
        name=name if isinstance(name, str) and Path(name).suffix else f"in the table{ending}", load=lambda: content
    )


READER = Reader(
    name="huggingface",
    title="parquet files of a folder, or of a data set on the Hugging Face hub by its name",
    read=read,
    options=(
        COLUMN,
        ANSWER_INDEX,
        Option("--files", {"metavar": "GLOB", "help": f"which parquet files of the source (default: {FILES})"}),
        Option(
            "--revision", {"metavar": "NAME", "help": "branch or commit on the hub, for example refs/convert/parquet"}
        ),
        SPLIT,
        OPEN,
        DISTRACTOR_COUNT,
        SEED,
        IMAGES,
        WITHOUT_IMAGES,
    ),
    licence="see the card of the data set",
    url="https://huggingface.co/datasets",
)
