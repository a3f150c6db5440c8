"""Read VQA-RAD (Lau et al. 2018): clinicians' questions about radiology images, with answers.

The published folder holds `VQA_RAD Dataset Public.json`, a JSON array of `{qid, phrase_type,
image_name, image_organ, question, question_type, answer, answer_type, …}`, and `VQA_RAD Image
Folder/`. Test questions are those whose `phrase_type` starts with `test`. Training and test
questions share images; the reader skips a training question that the test asks about the same
image.

This layout is known from publications alone; no published file was ever read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from rlmed.data.readers.base import Reader, Skipped, SourceRow
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

QUESTIONS, IMAGE_FOLDER = "VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"
MODALITIES = {"CHEST": "X-ray", "ABD": "CT"}
"""By organ, as in the paper; the files do not say whether images of the head are CT or MRI."""


def read(
    source: Path,
    *,
    images: Path | None = None,
    without_images: bool = False,
    **answers: Unpack[AnswerOptions],
) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of `train` and `test` in file order.

    Raises:
        ValueError: for a source without the published file.
    """
    path = source / QUESTIONS if source.is_dir() else source
    folder = path.parent / IMAGE_FOLDER if (path.parent / IMAGE_FOLDER).is_dir() else path.parent

    def elements() -> Iterator[Element]:
        for number, element in read_json_rows(path):
            yield f"row {number} of {path.name}", f"row-{number}", element

    found = None if without_images else images_of(images, folder)
    yield from read_answered(elements, _parse, images=found, **answers)


def _parse(element: Mapping[str, Any], default_id: str) -> Answered:
    return Answered(
        split="test" if as_text(element.get("phrase_type"), "phrase_type").startswith("test") else "train",
        id=as_text(element.get("qid"), "qid") or default_id,
        question=field(element, "question"),
        answer=answer_of(element),
        image=field(element, "image_name"),
        modality=MODALITIES.get(as_text(element.get("image_organ"), "image_organ").upper(), ""),
        kind=as_text(element.get("question_type"), "question_type"),
    )


READER = Reader(
    name="vqa_rad",
    title="VQA-RAD: clinicians' questions about radiology images",
    read=read,
    options=ANSWER_OPTIONS,
    licence="CC0 1.0",
    citation="Lau et al., A dataset of clinically generated visual questions and answers about radiology images, Sci Data 2018",
    url="https://osf.io/89kps/",
    unseen="the published files",
)
