"""Corpus for the tiny base model before RL: generated questions, completed by various readers.

A real base model has read much that is right and much that isn't, and its first answer is not its
best. RL starts from there, so this corpus deliberately creates that situation:

* A *careful* reader describes what the image shows, names what was asked, and looks its letter up.
  `<think>This is a T2-weighted MRI of the knee. There is a large cyst at the lower left. The size
  is large (C).</think>`, then `<answer>C</answer>`. The description teaches the eyes, the last
  sentence binds options to letters.
* A *hasty* reader ignores the image and guesses a random letter: `<think>Most likely (B).</think>`.

The kind of question decides who writes (`HASTY`): mostly the careful reader on modality and
anatomy, mostly the hasty one on disease, grading and attribute. Some completions break the format,
most of them hasty ones on attribute questions (`BROKEN`). So the base model scores well above
chance, and its greedy answer to a hard question is a guess, yet it can do better: sampled at
temperature 1, it is careful about one time in three. RL gets no completions; from the reward for
letter and format it must discover that looking pays. The corpus covers all three modalities, so
that what RL learns on MRI can transfer to CT and X-ray, as in MedVLM-R1 (arXiv 2502.19634).

Training uses three files in turn: `lookup` (text only, findings in words: format and letters at
little cost), `careful` (images, careful readers only), `readers` (images, the mixture).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlmed.core.types import LETTERS, Example
from rlmed.data.phantom.anatomy import NO_LESION
from rlmed.data.phantom.studies import KINDS, MODALITIES, Study, answer_values, make_example, render, sample_study
from rlmed.data.templates import PROMPT_SUFFIX

HASTY = {"modality": 0.1, "anatomy": 0.1, "disease": 0.65, "grading": 0.65, "attribute": 0.65}
"""Share of hasty readers by kind of question."""
BROKEN = {"careful": 0.03, "hasty": 0.08, "hasty attribute": 0.5}
"""Share of completions that break the format."""
ASKED = {"modality": "technique", "anatomy": "region", "disease": "finding", "grading": "size", "attribute": "place"}
GUESS = "Most likely"
"""All hasty readers' opening: with several, greedy decoding would pick the careful reader's."""
OPTION_COUNT = 4


def describe(study: Study) -> str:
    """Describe a study as a careful reader sees it.

    Example:
        >>> describe(Study("MRI", "FLAIR", "head", "cyst", "small", "upper left"))
        'This is a FLAIR MRI of the head. There is a small cyst at the upper left.'
    """
    scene = f"This is a {study.technique} {study.modality} of the {study.region}."
    if study.lesion == NO_LESION:
        return f"{scene} There is {NO_LESION}."
    return f"{scene} There is a {study.size} {study.lesion} at the {study.quadrant}."


def careful_reasoning(study: Study, example: Example) -> str:
    """Return a description, then the value asked for and its letter."""
    return f"{describe(study)} The {ASKED[example.kind]} is {example.options[example.answer]} ({example.letter})."


def completion(reasoning: str, letter: str, breach: int | None = None) -> str:
    """Return reasoning and answer in the paper's tags; `breach` 0 to 3 selects a format error."""
    whole = f"<think>{reasoning}</think>\n<answer>{letter}</answer>"
    breaches = (
        f"<think>{reasoning}</think>\n<answer>{letter}",
        f"<think>{reasoning}</think>\nThe answer is {letter}.",
        f"{whole}\nThat is all.",
        f"{reasoning}\n<answer>{letter}</answer>",
    )
    return whole if breach is None else breaches[breach]


def read_by_someone(study: Study, example: Example, rng: np.random.Generator) -> str:
    """Return the completion of a reader drawn by `HASTY` and `BROKEN`."""
    hasty = rng.random() < HASTY[example.kind]
    reader = "careful"
    if hasty:
        reader = "hasty attribute" if example.kind == "attribute" else "hasty"
    breach = int(rng.integers(4)) if rng.random() < BROKEN[reader] else None
    if not hasty:
        return completion(careful_reasoning(study, example), example.letter, breach)
    letter = LETTERS[int(rng.integers(len(example.options)))]
    return completion(f"{GUESS} ({letter}).", letter, breach)


def tokenizer_phrases() -> tuple[str, ...]:
    """Return the tiny tokenizer's one-token texts: the instruction, all answers after a space."""
    values = {value for kind in KINDS for modality in MODALITIES for value in answer_values(kind, modality)}
    return (PROMPT_SUFFIX, *(f" {value}" for value in sorted(values)))


def tokenizer_corpus(seed: int, rows: int = 3000) -> Iterator[str]:
    """Return domain texts from which the tiny tokenizer learns its vocabulary."""
    for index in range(rows):
        rng = np.random.default_rng([seed, 0, index])
        study = sample_study(rng, MODALITIES[index % len(MODALITIES)])
        example = _question(study, _kinds(study)[index % 4], f"{index}", None, rng)
        yield _with_findings(study, example).question_text
        yield completion(careful_reasoning(study, example), example.letter)
        yield read_by_someone(study, example, rng)


def write_alignment(folder: Path, seed: int, *, lookup_rows: int, studies: int, reader_studies: int) -> dict[str, Path]:
    """Write the three files and their images; return each file's path by name.

    Args:
        folder: created if missing.
        seed: the same seed gives the same rows.
        lookup_rows: rows of `lookup.jsonl`, one study each.
        studies: images, modalities in turn; `careful.jsonl` asks each kind of question once about
            each image.
        reader_studies: `readers.jsonl` asks again, in other words, about the first so many images.

    Raises:
        ValueError: for a size that is not positive, or more `reader_studies` than `studies`.
    """
    if min(lookup_rows, studies, reader_studies) <= 0 or reader_studies > studies:
        raise ValueError(
            f"write_alignment got lookup_rows={lookup_rows}, studies={studies}, reader_studies={reader_studies}: "
            "all must be positive, and reader_studies at most studies"
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    careful: list[dict[str, Any]] = []
    readers: list[dict[str, Any]] = []
    for index in range(studies):
        rng = np.random.default_rng([seed, 1, index])
        study = sample_study(rng, MODALITIES[index % len(MODALITIES)])
        image = Path("images") / f"{index:05d}.png"
        Image.fromarray(render(study, rng)).save(folder / image)
        for kind in _kinds(study):
            example = _question(study, kind, f"careful-{index:05d}-{kind}", image, rng)
            careful.append(_row(example, completion(careful_reasoning(study, example), example.letter)))
        for kind in _kinds(study) if index < reader_studies else ():
            example = _question(study, kind, f"readers-{index:05d}-{kind}", image, rng)
            readers.append(_row(example, read_by_someone(study, example, rng)))
    return {
        "lookup": _write(folder / "lookup.jsonl", _lookup_rows(seed, lookup_rows)),
        "careful": _write(folder / "careful.jsonl", careful),
        "readers": _write(folder / "readers.jsonl", readers),
    }


def _lookup_rows(seed: int, rows: int) -> Iterator[dict[str, Any]]:
    for index in range(rows):
        rng = np.random.default_rng([seed, 2, index])
        study = sample_study(rng, MODALITIES[index % len(MODALITIES)])
        kinds = _kinds(study)
        example = _question(study, kinds[int(rng.integers(len(kinds)))], f"lookup-{index:05d}", None, rng)
        written = completion(careful_reasoning(study, example), example.letter)
        yield _row(_with_findings(study, example), written)


def _kinds(study: Study) -> tuple[str, ...]:
    """Return the kinds of question that apply: no location without a lesion."""
    return tuple(kind for kind in KINDS if kind != "attribute" or study.lesion != NO_LESION)


def _question(study: Study, kind: str, id: str, image: Path | None, rng: np.random.Generator) -> Example:
    return make_example(study, kind, id, image, rng, int(rng.integers(OPTION_COUNT)))


def _with_findings(study: Study, example: Example) -> Example:
    """Return the text-only question: preceded by the findings in words."""
    return Example(
        id=example.id,
        image=None,
        question=f"Findings: {describe(study)} {example.question}",
        options=example.options,
        answer=example.answer,
        modality=example.modality,
        kind=example.kind,
    )


def _row(example: Example, written: str) -> dict[str, Any]:
    return {
        "id": example.id,
        "image": None if example.image is None else example.image.as_posix(),
        "question": example.question,
        "options": list(example.options),
        "answer": example.options[example.answer],
        "modality": example.modality,
        "kind": example.kind,
        "completion": written,
    }


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
