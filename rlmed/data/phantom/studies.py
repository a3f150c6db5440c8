"""Generate radiology questions: random studies, rendered by physics, with five kinds of question.

Everything derives from a seed. Each row has its own random stream, so it does not depend on the
number of rows. Correct answers and letters rotate in shuffled rounds, so that neither an option's
letter nor its text gives the answer away.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlmed.core.files.atomic import partial_folder, refusal, rename_into_place
from rlmed.core.files.litter import is_litter
from rlmed.core.files.ownership import remove
from rlmed.core.types import LETTERS, Example
from rlmed.data.phantom.anatomy import LESIONS, MODALITIES, NO_LESION, QUADRANTS, REGIONS, SIZES, TECHNIQUES, Study
from rlmed.data.phantom.render import render

__all__ = [
    "GENERATOR_VERSION",
    "KINDS",
    "MODALITIES",
    "SPLITS",
    "Split",
    "Study",
    "answer_values",
    "make_example",
    "render",
    "sample_study",
    "write_dataset",
    "write_split",
]

GENERATOR_VERSION = 1
"""Increase on any change of a seed's output; a dataset of another version is regenerated."""

KINDS = ("modality", "anatomy", "disease", "grading", "attribute")
"""OmniMedVQA's five kinds of question: here technique, region, lesion, lesion size and location."""

OPTION_COUNT = 4

QUESTIONS = {
    "modality": (
        "Which technique was used for this image?",
        "How was this image acquired or displayed?",
        "Which of these settings produced this image?",
    ),
    "anatomy": (
        "Which part of the body does this image show?",
        "Which body region was examined?",
        "What region is visible in this image?",
    ),
    "disease": (
        "Which abnormality, if any, does this image show?",
        "What is the most likely finding in this image?",
        "Which finding can be seen here?",
    ),
    "grading": (
        "What size is the lesion, if there is one?",
        "How would you grade the size of the lesion in this image?",
        "Which size of lesion does this image show?",
    ),
    "attribute": (
        "In which part of the image does the lesion lie?",
        "Where in the image is the lesion?",
        "Which quadrant of the image contains the lesion?",
    ),
}
"""Wordings by kind of question."""


def answer_values(kind: str, modality: str) -> tuple[str, ...]:
    """Return all possible answers to a kind of question; raise ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"Invalid kind={kind!r} in answer_values; expected one of {KINDS}")
    values = {"modality": TECHNIQUES[modality], "anatomy": REGIONS, "disease": LESIONS, "grading": SIZES}
    return values.get(kind, QUADRANTS)


def correct_answer(study: Study, kind: str) -> str:
    """Return the text of the correct answer to a kind of question about a study."""
    if kind == "attribute" and study.lesion == NO_LESION:
        raise ValueError("an attribute question needs a lesion; sample the study with kind='attribute'")
    answers = {
        "modality": study.technique,
        "anatomy": study.region,
        "disease": study.lesion,
        "grading": study.size,
        "attribute": study.quadrant,
    }
    if kind not in answers:
        raise ValueError(f"Invalid kind={kind!r} in correct_answer; expected one of {KINDS}")
    return answers[kind]


def sample_study(rng: np.random.Generator, modality: str, kind: str | None = None, value: str | None = None) -> Study:
    """Sample a study of a modality, every property uniform over its values.

    Args:
        rng: Source of randomness.
        modality: One of `MODALITIES`.
        kind: Kind of question that the study is for: what it asks about is uniform over the kind's
            values.
        value: The answer to the question of this kind, instead of a uniform one.

    Raises:
        ValueError: for an unknown modality, kind or value.
    """
    if modality not in TECHNIQUES:
        raise ValueError(f"Invalid modality={modality!r} in sample_study; expected one of {MODALITIES}")
    technique = str(rng.choice(TECHNIQUES[modality]))
    region = str(rng.choice(REGIONS))
    lesion = str(rng.choice(LESIONS[1:]))
    size = str(rng.choice(SIZES[1:]))
    quadrant = str(rng.choice(QUADRANTS))
    present = bool(rng.random() >= 1 / len(LESIONS))
    study = Study(modality, technique, region, lesion, size, quadrant)
    healthy = replace(study, lesion=NO_LESION, size=NO_LESION, quadrant=NO_LESION)
    if kind is None:
        return study if present else healthy
    values = answer_values(kind, modality)
    value = str(rng.choice(values)) if value is None else value
    if value not in values:
        raise ValueError(f"Invalid value={value!r} for kind={kind!r} in sample_study; expected one of {values}")
    if value == NO_LESION:
        return healthy
    field = {"modality": "technique", "anatomy": "region", "disease": "lesion", "grading": "size"}.get(kind, "quadrant")
    needs_lesion = kind in ("disease", "grading", "attribute")
    return replace(study if present or needs_lesion else healthy, **{field: value})


def make_example(
    study: Study, kind: str, id: str, image: Path | None, rng: np.random.Generator, answer_index: int
) -> Example:
    """Make a question of a kind about a study, the correct answer at `answer_index` of 4 options.

    Draws the wording, the other three options and their order from `rng`.

    Raises:
        ValueError: for an unknown kind, a location question without a lesion, or an `answer_index`
            outside 0 to 3.
    """
    if not 0 <= answer_index < OPTION_COUNT:
        raise ValueError(f"make_example got answer_index={answer_index}; there are {OPTION_COUNT} options, use 0 to 3")
    answer = correct_answer(study, kind)
    others = [value for value in answer_values(kind, study.modality) if value != answer]
    options = [others[i] for i in rng.permutation(len(others))[: OPTION_COUNT - 1]]
    options.insert(answer_index, answer)
    question = QUESTIONS[kind][int(rng.integers(len(QUESTIONS[kind])))]
    return Example(id, image, question, tuple(options), answer_index, study.modality, kind)


def _turn(stream: Sequence[int], index: int, count: int) -> int:
    """Return which of `count` items is due at `index`; each block of `count` has all, shuffled."""
    block = np.random.default_rng([*stream, index // count]).permutation(count)
    return int(block[index % count])


EXTRA_TURNS = (4, 11, 18)
"""Positions, among the rows of a kind, that go to one favoured answer instead of the next in turn.

If all answers were exactly equally frequent, counting the answers of all *other* rows would show
the correct one rarer by one, and give it away. Three extra turns make the count useless in both
directions.
"""


def _answer_at(stream: Sequence[int], index: int, values: Sequence[str]) -> str:
    """Return the answer of the row at `index` among the rows of its kind."""
    if index in EXTRA_TURNS:
        return values[int(np.random.default_rng([*stream, 1]).integers(len(values)))]
    return values[_turn([*stream, 2], index - sum(extra < index for extra in EXTRA_TURNS), len(values))]


def _row(name: str, modality: str, seed: int, index: int) -> tuple[Study, Example, np.random.Generator]:
    """Return a row's study, question (image: a relative path) and random stream for the picture."""
    split = [seed, zlib.crc32(name.encode())]
    kind_index, rank = index % len(KINDS), index // len(KINDS)
    kind = KINDS[kind_index]
    value = _answer_at([*split, 1, kind_index], rank, answer_values(kind, modality))
    letter = _turn([*split, 2, kind_index], rank, OPTION_COUNT)
    rng = np.random.default_rng([*split, 3, index])
    study = sample_study(rng, modality, kind, value)
    image = Path("images") / name / f"{index:05d}.png"
    return study, make_example(study, kind, f"{name}-{index:05d}", image, rng, letter), rng


def write_split(folder: Path, *, name: str, modality: str, rows: int, seed: int) -> Path:
    """Write `rows` questions about as many studies, kinds in turn; return the JSON Lines path.

    Writes `folder/<name>.jsonl`, rows {id, image, question, options, answer, modality, kind} with
    the image's path relative to `folder` and the answer as text, and `folder/images/<name>/*.png`.
    Deterministic; fewer rows are a prefix of more.

    Raises:
        ValueError: if `rows` is not positive or the modality unknown.
    """
    if rows <= 0:
        raise ValueError(f"write_split got rows={rows} for {name!r}; ask for at least one")
    (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(rows):
        study, example, rng = _row(name, modality, seed, index)
        assert example.image is not None
        Image.fromarray(render(study, rng)).save(folder / example.image)
        row = {
            "id": example.id,
            "image": example.image.as_posix(),
            "question": example.question,
            "options": list(example.options),
            "answer": example.options[example.answer],
            "modality": modality,
            "kind": example.kind,
        }
        lines.append(json.dumps(row) + "\n")
    path = folder / f"{name}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@dataclass(frozen=True, slots=True)
class Split:
    """One file of a dataset.

    Example:
        Split("test_ct", "CT", 300)
    """

    name: str
    modality: str
    rows: int


SPLITS = (
    Split("train_mri", "MRI", 600),
    Split("test_mri", "MRI", 300),
    Split("test_ct", "CT", 300),
    Split("test_xray", "X-ray", 300),
)
"""With the row counts of the MedVLM-R1 paper."""

MANIFEST = "dataset.json"


def _manifest(seed: int, splits: Sequence[Split]) -> dict[str, Any]:
    """Return the manifest of a finished dataset."""
    files = [{"name": split.name, "modality": split.modality, "rows": split.rows} for split in splits]
    return {"generator_version": GENERATOR_VERSION, "seed": seed, "letters": LETTERS[:OPTION_COUNT], "splits": files}


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    """Return whether the folder holds exactly this manifest's dataset, complete."""
    path = folder / MANIFEST
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != manifest:
        return False
    return all(
        (folder / f"{split['name']}.jsonl").is_file()
        and sum(not is_litter(path.name) for path in (folder / "images" / split["name"]).glob("*.png")) == split["rows"]
        for split in manifest["splits"]
    )


def write_dataset(folder: Path, seed: int, splits: Sequence[Split] = SPLITS) -> dict[str, Path]:
    """Write the generated dataset unless the folder has it; return JSON Lines files by split name.

    Everything is written to a folder beside it and renamed at the end, so a killed write never
    passes for complete, and concurrent writers all get the first one's. Replaces a dataset of
    another seed or generator version.

    Raises:
        ValueError: if the folder holds anything but a generated dataset.
        RecordError: if writing fails.
    """
    folder = folder.resolve()
    manifest = _manifest(seed, splits)
    paths = {split.name: folder / f"{split.name}.jsonl" for split in splits}

    def is_outdated() -> bool:
        if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise ValueError(
                f"{folder} holds files that are not a generated dataset; empty it or choose another folder"
            )
        return not _is_whole(folder, manifest)

    if not is_outdated():
        return paths
    try:
        aside = partial_folder(folder)
        try:
            for split in splits:
                write_split(aside, name=split.name, modality=split.modality, rows=split.rows, seed=seed)
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            rename_into_place(aside, folder, may_replace=is_outdated)
        finally:
            remove(aside)  # left after an error, or if another process finished first
    except OSError as error:
        raise refusal(folder, error, advice="start again") from error
    return paths
