"""Read data sets with answers but no options: VQA-RAD, SLAKE and PathVQA differ only in fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from rlmed.data.examples import BadRowError
from rlmed.data.images import BadImageError
from rlmed.data.options.choices import written_answer
from rlmed.data.readers.base import Encoded, Skipped, SourceImage, SourceRow
from rlmed.data.readers.formats.image_files import Images
from rlmed.data.readers.formats.table import IMAGES, WITHOUT_IMAGES, as_text
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
from rlmed.data.rows import as_object

TEST_SPLIT = "test"
REPEATED = "an earlier row has the same image, question and answer"
ANSWER_OPTIONS = (OPEN, DISTRACTOR_COUNT, SEED, IMAGES, WITHOUT_IMAGES)


class AnswerOptions(TypedDict, total=False):
    """What `read_answered` takes of the command line."""

    open: str
    distractors: int
    seed: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with its answer.

    Example:
        Answered(split="train", id="slake-7", question="Which organ is shown?", answer="Liver",
                 image="xmlab1/source.jpg", modality="CT", kind="Organ")
    """

    split: str
    id: str
    question: str
    answer: str
    image: str | SourceImage
    """Where `images` find it, or the image itself; "" for none."""
    modality: str
    kind: str


Element = tuple[str, str, Any]
"""Location, default id and value of an element."""
Parse = Callable[[Mapping[str, Any], str], Answered | str]
"""Maps (element, default id) to a question, or to why it is skipped by choice.

Raises BadRowError.
"""


def read_answered(
    elements: Callable[[], Iterable[Element]],
    parse: Parse,
    *,
    images: Images | None,
    repeats: bool = True,
    open: str = "distractors",
    distractors: int = DISTRACTORS,
    seed: int = 0,
) -> Iterator[SourceRow | Skipped]:
    """Yield rows with options, or open ones; calls `elements` twice for the distractors.

    Skips a question outside the test split that the test asks about the same image; and without
    `repeats`, one that an earlier row of its split asks about its image, with the same answer.

    Raises:
        ValueError: for an invalid number of distractors or seed.
    """
    pool, held_out = AnswerPool(seed, distractors), set()
    for where, default_id, element in elements():
        entry = _read_entry(element, where, default_id, parse)
        if isinstance(entry, Answered):
            pool.add(entry.kind, entry.answer)
            if entry.split == TEST_SPLIT:
                held_out.add(_key(entry))
    seen: dict[tuple[object, ...], str] = {}
    for where, default_id, element in elements():
        entry = _read_entry(element, where, default_id, parse)
        if isinstance(entry, Skipped):
            yield entry
            continue
        row = (entry.split, *_key(entry), entry.answer)
        first = where if repeats or not entry.image else seen.setdefault(row, where)
        if first != where:
            yield Skipped(where, entry.id, REPEATED, chosen=True)
        elif entry.image and entry.split != TEST_SPLIT and _key(entry) in held_out:
            yield Skipped(where, entry.id, "the test asks the same of the same image", chosen=True)
        elif entry.answer not in YES_NO and open == "skip":
            yield Skipped(where, entry.id, LEFT_OUT, chosen=True)
        else:
            yield _row(entry, where, pool, images, open)


def field(element: Mapping[str, Any], name: str) -> str:
    """Return a field as stripped text. Raises BadRowError if it is missing or not text."""
    text = as_text(element.get(name), name)
    if not text:
        raise BadRowError(f"it has no {name}")
    return text


def _read_entry(element: Any, where: str, default_id: str, parse: Parse) -> Answered | Skipped:
    try:
        entry = parse(as_object(element), default_id)
    except BadRowError as error:
        return Skipped(where, default_id, str(error))
    return Skipped(where, default_id, entry, chosen=True) if isinstance(entry, str) else entry


def _key(entry: Answered) -> tuple[object, str]:
    image = entry.image.key if isinstance(entry.image, Encoded) else entry.image
    return image, entry.question.casefold()


def _row(entry: Answered, where: str, pool: AnswerPool, images: Images | None, open: str) -> SourceRow | Skipped:
    try:
        is_open = open_answer(entry.answer, open)
        options = () if is_open else pool.options(entry.id, entry.kind, entry.answer)
        return SourceRow(
            where=where,
            split=entry.split,
            id=entry.id,
            question=entry.question,
            options=options,
            answer=entry.answer if is_open else written_answer(options, options.index(entry.answer)),
            image=_image(entry.image, images),
            modality=entry.modality,
            kind=entry.kind,
            task="open" if is_open else "choice",
        )
    except (BadRowError, BadImageError) as error:
        return Skipped(where, entry.id, str(error))


def _image(image: str | SourceImage, images: Images | None) -> SourceImage | None:
    if not isinstance(image, str):
        return image
    return None if images is None else images.find(image)


def answer_of(element: Mapping[str, Any]) -> str:
    """Return the answer as `plain_answer` writes it. Raises BadRowError without one."""
    return plain_answer(field(element, "answer"))
