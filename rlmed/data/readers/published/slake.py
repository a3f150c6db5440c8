"""Read SLAKE 1.0 (arXiv 2102.09542): English and Chinese questions on radiology images, answered.

The published folder holds `train.json`, `validate.json` (or `validation.json`) and `test.json`,
each a JSON array of `{qid, img_name, question, answer, q_lang, modality, answer_type, content_type,
…}`, and `imgs/xmlab<n>/source.jpg` (or `imgs.zip`).

This layout is known from publications alone; no published file was ever read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from rlmed.core.files.near_paths import near_path
from rlmed.data.readers.base import Option, Reader, Skipped, SourceRow
from rlmed.data.readers.formats.image_files import images_of
from rlmed.data.readers.formats.json_rows import read_json_rows
from rlmed.data.readers.formats.table import as_text
from rlmed.data.readers.published.answers import (
    ANSWER_OPTIONS,
    Answered,
    AnswerOptions,
    Element,
    answer_of,
    field,
    read_answered,
)
from rlmed.data.readers.published.modalities import modality_name

FILES = {"train.json": "train", "validate.json": "validate", "validation.json": "validate", "test.json": "test"}
"""Split by file."""
LANGUAGES = ("en", "zh", "all")


def read(
    source: Path,
    *,
    language: str = "en",
    images: Path | None = None,
    without_images: bool = False,
    **answers: Unpack[AnswerOptions],
) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of `train`, `validate` and `test`.

    Raises:
        ValueError: for a folder without the published files.
    """
    files = [(source / name, split) for name, split in FILES.items() if (source / name).is_file()]
    if not files:
        advice = near_path(source) or "give the folder that Slake1.0.zip unpacks to"
        raise ValueError(f"{source} holds none of {', '.join(FILES)}: {advice}")
    beside = next((source / name for name in ("imgs", "imgs.zip") if (source / name).exists()), source)

    def elements() -> Iterator[Element]:
        for path, split in files:
            for number, element in read_json_rows(path):
                fields = {**element, "split": split} if isinstance(element, Mapping) else element
                yield f"row {number} of {path.name}", f"{split}-{number}", fields

    def parse(element: Mapping[str, Any], default_id: str) -> Answered | str:
        if language != "all" and (tongue := field(element, "q_lang")) != language:
            return f"its language is {tongue}, which is not asked for"
        return _parse(element, default_id)

    found = None if without_images else images_of(images, beside)
    yield from read_answered(elements, parse, images=found, **answers)


def _parse(element: Mapping[str, Any], default_id: str) -> Answered:
    return Answered(
        split=str(element["split"]),
        id=as_text(element.get("qid"), "qid") or default_id,
        question=field(element, "question"),
        answer=answer_of(element),
        image=field(element, "img_name"),
        modality=modality_name(as_text(element.get("modality"), "modality")),
        kind=as_text(element.get("content_type"), "content_type"),
    )


READER = Reader(
    name="slake",
    title="SLAKE: questions in English and Chinese about radiology images",
    read=read,
    options=(
        Option("--language", {"choices": LANGUAGES, "help": "of the questions (default: en)"}),
        *ANSWER_OPTIONS,
    ),
    licence="CC BY 4.0, as its card says",
    citation="Liu et al., SLAKE: a semantically-labeled knowledge-enhanced dataset, ISBI 2021, arXiv 2102.09542",
    url="https://www.med-vqa.com/slake/",
    unseen="the published files",
)
