"""Read PathVQA (He et al. 2020, arXiv 2003.10286): questions about pathology images, with answers.

The authors' release, a folder called `pvqa`, holds `qas/<split>/<split>_qa.pkl` for `train`, `val`
and `test`, each a pickled list of `{"image": "train_0422", "question", "answer"}`, and
`images/<split>/train_0422.jpg`. The copy on the hub, `flaviagiammarino/path-vqa`, is parquet with
the columns `image`, `question` and `answer` and the splits `train`, `validation` and `test`.

Both layouts are known from code and cards that read them; no published file was ever read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from rlmed.core.files.near_paths import near_path
from rlmed.data.examples import BadRowError
from rlmed.data.images import BadImageError
from rlmed.data.readers.base import Encoded, Reader, Skipped, SourceImage, SourceRow
from rlmed.data.readers.formats.huggingface import FILES, parquet_files, split_name, stored_images
from rlmed.data.readers.formats.image_files import images_of
from rlmed.data.readers.formats.parquet_rows import ParquetTable
from rlmed.data.readers.formats.pickle_rows import read_pickled_rows
from rlmed.data.readers.formats.table import Columns, ImagesOf, Record, no_images
from rlmed.data.readers.options import YES_NO
from rlmed.data.readers.published.answers import (
    ANSWER_OPTIONS,
    Answered,
    AnswerOptions,
    Element,
    answer_of,
    field,
    read_answered,
)

SPLITS = ("train", "val", "test")
_KIND = re.compile(r"\b(how many|how much|how|what|where|when|whose|who|which|why)\b")
"""What is asked for, by the first such word, much as the paper counts its questions."""
MODALITY = "Pathology"


def read(
    source: Path,
    *,
    images: Path | None = None,
    without_images: bool = False,
    **answers: Unpack[AnswerOptions],
) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of `train`, `val` (of the hub's copy `validation`) and `test`, none twice.

    Raises:
        ValueError: for a folder with neither layout, or a pickle that is more than plain rows.
    """
    root = next((folder for folder in (source, source / "pvqa") if (folder / "qas").is_dir()), None)
    if root is not None:
        rows = _released(root, images, without_images, answers)
    elif source.suffix == ".parquet" or next(source.glob(FILES), None) or not source.exists():
        rows = _hub_copy(source, images, without_images, answers)
    else:
        raise ValueError(
            f"{source} holds neither qas/train/train_qa.pkl … (the authors' release) nor parquet files (the hub's copy): "
            f"{near_path(source) or 'give the folder that holds one of them'}"
        )
    yield from rows


def _released(
    root: Path, images: Path | None, without_images: bool, answers: AnswerOptions
) -> Iterator[SourceRow | Skipped]:
    files = [(root / "qas" / split / f"{split}_qa.pkl", split) for split in SPLITS]
    present = [(path, split) for path, split in files if path.is_file()]
    if not present:
        raise ValueError(
            f"{root / 'qas'} holds none of {', '.join(f'{s}/{s}_qa.pkl' for s in SPLITS)}: unpack it again"
        )
    loaded = [(path.name, split, read_pickled_rows(path)) for path, split in present]

    def elements() -> Iterator[Element]:
        for name, split, rows in loaded:
            for number, element in enumerate(rows):
                fields = {**element, "split": split} if isinstance(element, Mapping) else element
                yield f"row {number} of {name}", f"{split}-{number}", fields

    def parse(element: Mapping[str, Any], default_id: str) -> Answered:
        name = field(element, "image")
        path = f"{element['split']}/{name}"
        return _answered(element, default_id, path if Path(name).suffix else f"{path}.jpg")

    found = None if without_images else images_of(images, root / "images")
    return read_answered(elements, parse, images=found, repeats=False, **answers)


def _hub_copy(
    source: Path, images: Path | None, without_images: bool, answers: AnswerOptions
) -> Iterator[SourceRow | Skipped]:
    root, paths = parquet_files(source, FILES, None)
    tables = [(path.relative_to(root), ParquetTable(path)) for path in paths]
    required = ("question", "answer") if without_images else ("image", "question", "answer")
    found = [
        Columns.find(str(name), table.columns, {}, required=required, options_required=False) for name, table in tables
    ]
    folder = None if without_images else images_of(images, root)

    def elements() -> Iterator[Element]:
        numbers: Counter[str] = Counter()
        for (name, table), columns in zip(tables, found, strict=True):
            split = split_name(name)
            stored = no_images if folder is None else stored_images(columns, folder)
            for number, record in table.rows(columns.used(images=not without_images)):
                element = _stored(record, split, columns, stored)
                yield f"row {number} of {name.as_posix()}", f"{split}-{numbers[split]}", element
                numbers[split] += 1

    def parse(element: Mapping[str, Any], default_id: str) -> Answered:
        return _answered(element, default_id, element["image"])

    return read_answered(elements, parse, images=None, repeats=False, **answers)


def _stored(record: Record, split: str, columns: Columns, stored: ImagesOf) -> Mapping[str, Any] | BadRowError:
    """Return a record of the hub's copy as an element, its image named after its content."""
    try:
        image = next(iter(stored(record)), "")
    except (BadRowError, BadImageError) as error:
        return BadRowError(str(error))
    if isinstance(image, Encoded):
        image = dataclasses.replace(image, key=hashlib.sha256(image.load()).hexdigest())
    return {"split": split, "image": image, **{name: columns.text(record, name) for name in ("question", "answer")}}


def _answered(element: Mapping[str, Any], default_id: str, image: str | SourceImage) -> Answered:
    question, answer = field(element, "question"), answer_of(element)
    asked = _KIND.search(question.casefold())
    return Answered(
        split=str(element["split"]),
        id=default_id,
        question=question,
        answer=answer,
        image=image,
        modality=MODALITY,
        kind="yes/no" if answer in YES_NO else asked[0] if asked else "other",
    )


READER = Reader(
    name="path_vqa",
    title="PathVQA: questions about pathology images, as the authors published them or in the hub's copy",
    read=read,
    options=ANSWER_OPTIONS,
    licence="MIT, as the card of the hub's copy says; the images belong to the publishers of two textbooks and to PEIR",
    citation="He et al., PathVQA: 30000+ questions for medical visual question answering, 2020, arXiv 2003.10286",
    url="https://github.com/UCSD-AI4H/PathVQA",
    unseen="the published files",
)
