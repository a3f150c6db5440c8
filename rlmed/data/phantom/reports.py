"""Corpus for a vision-language model of real words: generated questions, answered in plain English.

Unlike the tiny model's corpus (`rlmed.data.phantom.corpus`), the same fact is put in several ways,
so a model of it reasons in words of its own choice, and sampled completions differ. A *careful*
reader says what the image shows and concludes. A *hasty* reader names an option unseen. What share
of the readings is hasty is a setting: RL starts from a mixture.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlmed.core.files.atomic import replace_text
from rlmed.core.types import LETTERS, Example
from rlmed.data.phantom.anatomy import LESIONS, NO_LESION, QUADRANTS, REGIONS, SIZES, TECHNIQUES, Study
from rlmed.data.phantom.corpus import completion
from rlmed.data.phantom.studies import KINDS, MODALITIES, make_example, render, sample_study

LINE = 2
"""Words of each of `visual_lines`: visual tokens in a row of a quarter of a 112-pixel picture."""
_SCANS = {"MRI": "a {technique} MRI", "CT": "a CT in the {technique}", "X-ray": "an X-ray in {technique}"}
_SCENES = (
    "The image shows the {region} on {scan}.",
    "This is {scan} of the {region}.",
    "I see the {region}, and it looks like {scan}.",
    "We are looking at {scan} of the {region}.",
)
_LESIONS = (
    "There is a {size} {lesion} at the {quadrant}.",
    "A {size} {lesion} lies in the {quadrant} part.",
    "At the {quadrant} I find a {size} {lesion}.",
    "It shows a {size} {lesion}, located {quadrant}.",
)
_HEALTHY = (
    "There is no lesion.",
    "I find no lesion anywhere.",
    "Everything looks normal, with no lesion.",
    "It shows no lesion.",
)
_CONCLUSIONS = (
    "So the {asked} is {answer}, option {letter}.",
    "That makes the {asked} {answer} ({letter}).",
    "The {asked} is therefore {answer}, which is {letter}).",
    "This fits {answer} ({letter}).",
)
_GUESSES = (
    "It is most likely {answer} ({letter}).",
    "At first glance I would say {answer}, option {letter}.",
    "My first impression is {answer} ({letter}).",
)
_ASKED = {"modality": "technique", "anatomy": "region", "disease": "finding", "grading": "size", "attribute": "place"}


def visual_lines(study: Study) -> tuple[str, ...]:
    """Return what a picture's 4 x 4 visual tokens say, two words a text, row by row.

    Each quarter of the picture says in two lines what it shows: a lesion, if there is one in it,
    else technique, modality and region.

    Example:
        >>> visual_lines(Study("MRI", "FLAIR", "head", "cyst", "small", "upper left"))[:4]
        (' small cyst', ' FLAIR', ' upper left', ' MRI head')
    """
    technique = study.technique.removesuffix("-weighted").replace("-density", " density").replace("-tissue", "")
    scene = (f" {technique}", f" {study.modality.removesuffix('-ray')} {study.region}")
    lesion = (f" {study.size} {study.lesion}", f" {study.quadrant}")
    quarters = [lesion if quadrant == study.quadrant else scene for quadrant in QUADRANTS]
    upper, lower = quarters[:2], quarters[2:]
    return tuple(quarter[line] for pair in (upper, lower) for line in (0, 1) for quarter in pair)


def all_studies() -> Iterator[Study]:
    """Yield every possible study."""
    lesions = itertools.product(LESIONS[1:], SIZES[1:], QUADRANTS)
    found = [(NO_LESION, NO_LESION, NO_LESION), *lesions]
    for modality in MODALITIES:
        for technique, region, lesion in itertools.product(TECHNIQUES[modality], REGIONS, found):
            yield Study(modality, technique, region, *lesion)


def all_lines() -> list[str]:
    """Return every line that `visual_lines` can write."""
    return sorted({line for study in all_studies() for line in visual_lines(study)})


def describe_freely(study: Study, rng: np.random.Generator) -> str:
    """Return a description in two sentences, worded by chance."""
    scan = _SCANS[study.modality].format(technique=study.technique)
    scene = _one_of(_SCENES, rng).format(region=study.region, scan=scan)
    found = _one_of(_HEALTHY if study.lesion == NO_LESION else _LESIONS, rng)
    return f"{scene} {found.format(size=study.size, lesion=study.lesion, quadrant=study.quadrant)}"


def read_freely(study: Study, example: Example, rng: np.random.Generator, *, hasty: float) -> str:
    """Return the completion of a careful reader or, with probability `hasty`, of a hasty one."""
    if rng.random() < hasty:
        place = int(rng.integers(len(example.options)))
        guess = _one_of(_GUESSES, rng).format(answer=example.options[place], letter=LETTERS[place])
        return completion(guess, LETTERS[place])
    words = {"asked": _ASKED[example.kind], "answer": example.options[example.answer], "letter": example.letter}
    return completion(f"{describe_freely(study, rng)} {_one_of(_CONCLUSIONS, rng).format(**words)}", example.letter)


def studies_of(seed: int, start: int, count: int) -> list[tuple[Study, Image.Image]]:
    """Return `count` studies of the stream of `seed` from `start`, modalities in turn, drawn."""
    made = []
    for index in range(start, start + count):
        rng = np.random.default_rng([seed, 3, index])
        study = sample_study(rng, MODALITIES[index % len(MODALITIES)])
        made.append((study, Image.fromarray(render(study, rng)).convert("RGB")))
    return made


def write_readings(
    folder: Path, name: str, seed: int, studies: Sequence[tuple[Study, Image.Image]], *, hasty: float
) -> Path:
    """Write one question about each study, and a reader's completion; return the JSON Lines path.

    Args:
        folder: created if missing; pictures go to `images/NAME`.
        name: of the file.
        seed: of questions and wording.
        studies: what the readers see, and the picture that shows it.
        hasty: share of hasty readers.

    Raises:
        ValueError: for no studies, or a share out of range.
    """
    if not studies or not 0 <= hasty <= 1:
        raise ValueError(f"write_readings got {len(studies)} studies, hasty={hasty}: give some, and hasty in 0 to 1")
    (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index, (study, picture) in enumerate(studies):
        rng = np.random.default_rng([seed, 4, index])
        image = Path("images") / name / f"{index:05d}.png"
        picture.convert("L").save(folder / image)
        example = _question(study, f"{name}-{index:05d}", image, rng)
        rows.append(
            {
                "id": example.id,
                "image": image.as_posix(),
                "question": example.question,
                "options": list(example.options),
                "answer": example.options[example.answer],
                "modality": example.modality,
                "kind": example.kind,
                "completion": read_freely(study, example, rng, hasty=hasty),
            }
        )
    path = folder / f"{name}.jsonl"
    return replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _question(study: Study, id: str, image: Path, rng: np.random.Generator) -> Example:
    kinds = [kind for kind in KINDS if kind != "attribute" or study.lesion != NO_LESION]
    return make_example(study, _one_of(kinds, rng), id, image, rng, int(rng.integers(4)))


def _one_of(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]
