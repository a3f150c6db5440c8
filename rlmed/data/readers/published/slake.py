"""Read SLAKE 1.0 (arXiv 2102.09542): English and Chinese questions on radiology images, answered.

The published folder holds `train.json`, `validate.json` (or `validation.json`) and `test.json`,
each a JSON array of `{qid, img_name, question, answer, q_lang, modality, answer_type, content_type,
…}`, and `imgs/xmlab<n>/source.jpg` (or `imgs.zip`). Beside each image, `detection.json` names what
it shows, with boxes in pixels: `[{"Liver": [x, y, width, height]}, …]`.

This layout is known from publications alone; no published file was ever read.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

from rlmed.core.files.near_paths import near_path
from rlmed.data.examples import BadRowError
from rlmed.data.images import BadImageError
from rlmed.data.options.sources import unique_keys
from rlmed.data.readers.base import Encoded, Option, Reader, Skipped, SourceRow
from rlmed.data.readers.boxes import corners
from rlmed.data.readers.formats.image_files import Images, images_of
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
from rlmed.data.rows import as_object

DETECTION = "detection.json"
FILES = {"train.json": "train", "validate.json": "validate", "validation.json": "validate", "test.json": "test"}
"""Split by file."""
LANGUAGES = ("en", "zh", "all")


def read(
    source: Path,
    *,
    language: str = "en",
    boxes: bool = False,
    images: Path | None = None,
    without_images: bool = False,
    **answers: Unpack[AnswerOptions],
) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of `train`, `validate`, `test`; with `boxes` then those of `train_boxes`, …

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
    if boxes and found is not None:
        yield from _read_boxes(elements, found)


def _read_boxes(elements: Callable[[], Iterable[Element]], images: Images) -> Iterator[SourceRow | Skipped]:
    """Yield a grounding row for each name in the `detection.json` of each image of a question.

    An image of several splits counts for the last, so the test's stay out of training.
    """
    shown: dict[str, tuple[str, str]] = {}
    for _, default_id, element in elements():
        with suppress(BadRowError):  # reported as the question's
            entry = _parse(as_object(element), default_id)
            shown[str(entry.image)] = entry.split, entry.modality
    for name, (split, modality) in shown.items():
        folder = PurePosixPath(name).parent
        where, row_id = f"{DETECTION} of {folder}", f"{folder}".replace("/", "-")
        try:
            found = _detected(images.find(str(folder / DETECTION)))
            image = images.find(name)
        except (BadRowError, BadImageError) as error:
            yield Skipped(where, row_id, str(error))
            continue
        for what, published in found.items():
            try:
                yield SourceRow(
                    where=where,
                    split=f"{split}_boxes",
                    id=f"{row_id}-{what}",
                    question=f"Where in the image is the {what}?",
                    options=(),
                    answer=[corners(box) for box in published],
                    image=image,
                    modality=modality,
                    kind="boxes",
                    task="grounding",
                )
            except BadRowError as error:
                yield Skipped(where, f"{row_id}-{what}", str(error))


def _detected(file: Path | Encoded) -> dict[str, list[Any]]:
    """Return the boxes by name in a `detection.json`.

    Raises:
        BadRowError: if it is anything but an object, or a list of objects, from names to boxes.
    """
    try:
        content = file.load() if isinstance(file, Encoded) else file.read_bytes()
        read = json.loads(content, object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise BadRowError(f"its {DETECTION} cannot be read ({error}): copy it again") from error
    found: defaultdict[str, list[Any]] = defaultdict(list)
    for entry in read if isinstance(read, list) else [read]:
        for name, value in as_object(entry).items():
            several = isinstance(value, list) and value and isinstance(value[0], list)
            found[" ".join(name.split()).lower()] += value if several else [value]
    return dict(found)


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
        Option(
            "--boxes",
            {"action": "store_true", "help": "also ask for the boxes of what each image shows, in files of their own"},
            beside="--without-images",
        ),
        *ANSWER_OPTIONS,
    ),
    licence="CC BY 4.0, as its card says",
    citation="Liu et al., SLAKE: a semantically-labeled knowledge-enhanced dataset, ISBI 2021, arXiv 2102.09542",
    url="https://www.med-vqa.com/slake/",
    unseen="the published files",
)
