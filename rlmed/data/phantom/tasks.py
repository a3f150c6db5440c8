"""Generate questions of every task about generated studies: open, grounding, labels, report, mixed.

The truth is what was drawn. As in `rlmed.data.phantom.studies`, everything derives from a seed,
each row has its own random stream, and right answers come in shuffled rounds, so that neither the
wording nor the frequency of an answer gives it away:

* `open` asks for technique, region, lesion, size or quadrant in turn; each answer is due equally
  often, and other usual words for it are accepted.
* `grounding` asks for the box of the lesion, whatever it is or by its kind. Each quadrant is due
  equally often, and one image in five shows nothing that was asked for.
* `labels` shows all words of two or three of region, size, lesion and quadrant, so 0 to 3 are true.
  Every such choice is due equally often, and so is each kind of lesion and none.
* `report` asks for a short report, with two wordings as references.
* `mixed` has all of them and multiple choice, in turn.

Each row has a `completion` for supervised learning, in the embedded model's words. Boxes in it are
in thousandths of width and height, as Qwen2-VL writes them, rounded to tens.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rlmed.core.files.atomic import partial_folder, refusal, rename_into_place
from rlmed.core.files.litter import is_litter
from rlmed.core.files.ownership import remove
from rlmed.data.phantom.anatomy import LESIONS, MODALITIES, NO_LESION, QUADRANTS, REGIONS, SIZES, Study
from rlmed.data.phantom.corpus import ASKED, careful_reasoning, describe
from rlmed.data.phantom.render import Box, render_with_box
from rlmed.data.phantom.studies import (
    EXTRA_TURNS,
    GENERATOR_VERSION,
    KINDS,
    OPTION_COUNT,
    answer_values,
    correct_answer,
    make_example,
    sample_study,
)
from rlmed.data.phantom.task_texts import QUESTIONS, accepted, reports, written

TASKS_VERSION = 2
"""Increase on any change of a seed's output; data of another version is regenerated."""
TASKS = ("choice", "open", "grounding", "labels", "report")
"""In the order in which `mixed` has them."""
FILES = (*TASKS[1:], "mixed")
"""What `write_task_dataset` writes a pair of files for."""
TRAIN_ROWS, TEST_ROWS = 600, 300
MANIFEST = "tasks.json"
IMAGE_SIZE = 112
"""Width and height of the images in pixels."""
FRAME = 1000
"""Width and height of the frame in which a completion writes boxes."""

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "region": REGIONS,
    "size": SIZES[1:],
    "lesion": LESIONS[1:],
    "quadrant": QUADRANTS,
}
"""Labels by the field of a study that they are true of, in the order of a description."""
SHOWN = (*itertools.combinations(CATEGORIES, 2), *itertools.combinations(CATEGORIES, 3))
"""Which of them a question of `labels` can show."""

Row = dict[str, Any]


class Plan(NamedTuple):
    """What a row shows and asks.

    Example:
        Plan(Study("MRI", "FLAIR", "head", "cyst", "small", "upper left"), "disease")
    """

    study: Study
    asked: str
    """Open, report and choice: a kind of question; grounding: "lesion" or a kind of lesion; labels:
    the categories whose words are shown, with blanks between."""


class Turns(NamedTuple):
    """A row's place among those of its task in a file.

    Example:
        >>> Turns((0, 3421780262, 2), 7).modality
        'CT'
    """

    stream: tuple[int, ...]
    rank: int

    @property
    def modality(self) -> str:
        """Return the modality of the row: they come in turn."""
        return MODALITIES[self.rank % len(MODALITIES)]

    def due(self, values: Sequence[Any], *, among: int, stream: int = 0) -> Any:
        """Return which value is due; each shuffled round has all, plus the turns of a favourite.

        Args:
            values: to choose from.
            among: rows that share these rounds are this far apart.
            stream: of independent rounds.
        """
        index, mine = self.rank // among, (*self.stream, stream, self.rank % among)
        if index in EXTRA_TURNS:
            return values[int(np.random.default_rng([*mine, 1]).integers(len(values)))]
        round_number, place = divmod(index - sum(extra < index for extra in EXTRA_TURNS), len(values))
        return values[int(np.random.default_rng([*mine, 2, round_number]).permutation(len(values))[place])]


def _one_of(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]


def _plan_kinds(turns: Turns, rng: np.random.Generator) -> Plan:
    """Plan a question of one of the five kinds, in turn; its answer is due."""
    kind = KINDS[turns.rank % len(KINDS)]
    among = len(KINDS) * (len(MODALITIES) if kind == "modality" else 1)  # each modality has its own techniques
    value = turns.due(answer_values(kind, turns.modality), among=among)
    return Plan(sample_study(rng, turns.modality, kind, value), kind)


def _plan_grounding(turns: Turns, rng: np.random.Generator) -> Plan:
    """Plan a question for any lesion and for one kind of lesion, in turn; its quadrant is due."""
    place = turns.due((*QUADRANTS, NO_LESION), among=2)
    named = turns.rank % 2 == 1
    asked = turns.due(LESIONS[1:], among=2, stream=1)
    if place == NO_LESION:
        others = [lesion for lesion in LESIONS[1:] if lesion != asked]
        shown = _one_of(others, rng) if named and rng.random() < 0.5 else NO_LESION
        return Plan(sample_study(rng, turns.modality, "disease", shown), asked if named else "lesion")
    study = sample_study(rng, turns.modality, "attribute", place)
    return Plan(replace(study, lesion=asked), asked) if named else Plan(study, "lesion")


def _plan_labels(turns: Turns, rng: np.random.Generator) -> Plan:
    """Plan a question that shows the categories that are due; so is the lesion."""
    lesion = turns.due(LESIONS, among=1, stream=1)
    return Plan(sample_study(rng, turns.modality, "disease", lesion), " ".join(turns.due(SHOWN, among=1)))


def _choice(plan: Plan, box: Box | None, turns: Turns, rng: np.random.Generator) -> Row:
    """Return a multiple-choice question; its letter is due."""
    letter = turns.due(range(OPTION_COUNT), among=len(KINDS), stream=1)
    example = make_example(plan.study, plan.asked, "", None, rng, letter)
    return {
        "question": example.question,
        "options": list(example.options),
        "answer": example.options[example.answer],
        "kind": plan.asked,
        "completion": written(careful_reasoning(plan.study, example), example.letter),
    }


def _open(plan: Plan, box: Box | None, turns: Turns, rng: np.random.Generator) -> Row:
    """Return an open question and all texts that answer it."""
    answer = correct_answer(plan.study, plan.asked)
    texts = accepted(answer)
    return {
        "question": _one_of(QUESTIONS[plan.asked], rng),
        "answer": texts if len(texts) > 1 else answer,
        "kind": plan.asked,
        "completion": written(f"{describe(plan.study)} The {ASKED[plan.asked]} is {answer}.", answer),
    }


def _grounding(plan: Plan, box: Box | None, turns: Turns, rng: np.random.Generator) -> Row:
    """Return a question for boxes; none if the study lacks what it asks for."""
    sought = box is not None and plan.asked in ("lesion", plan.study.lesion)
    boxes = [list(box)] if box is not None and sought else []
    scaled = [[10 * round(edge * FRAME / IMAGE_SIZE / 10) for edge in edges] for edges in boxes]
    return {
        "question": _one_of(QUESTIONS["grounding"], rng).format(what=plan.asked),
        "answer": boxes,
        "kind": "any lesion" if plan.asked == "lesion" else "named lesion",
        "completion": written(describe(plan.study), json.dumps(scaled)),
    }


def _labels(plan: Plan, box: Box | None, turns: Turns, rng: np.random.Generator) -> Row:
    """Return a question for all labels that are true, among the words of the planned categories."""
    categories = plan.asked.split()
    shown = [value for name in categories for value in CATEGORIES[name]]
    true = [getattr(plan.study, name) for name in categories]
    answer = [value for value in true if value != NO_LESION]
    return {
        "question": _one_of(QUESTIONS["labels"], rng),
        "options": [shown[index] for index in rng.permutation(len(shown))],
        "answer": answer,
        "kind": "findings",
        "completion": written(describe(plan.study), ", ".join(answer) or "none"),
    }


def _report(plan: Plan, box: Box | None, turns: Turns, rng: np.random.Generator) -> Row:
    """Return a request for a report, with its references."""
    references = reports(plan.study)
    return {
        "question": _one_of(QUESTIONS["report"], rng),
        "answer": references,
        "kind": "report",
        "completion": written(describe(plan.study), references[0]),
    }


Planner = Callable[[Turns, np.random.Generator], Plan]
Writer = Callable[[Plan, Box | None, Turns, np.random.Generator], Row]
_MAKERS: Mapping[str, tuple[Planner, Writer]] = {
    "choice": (_plan_kinds, _choice),
    "open": (_plan_kinds, _open),
    "grounding": (_plan_grounding, _grounding),
    "labels": (_plan_labels, _labels),
    "report": (_plan_kinds, _report),
}


def make_row(name: str, seed: int, index: int) -> tuple[Row, Image.Image]:
    """Return row `index` of the file `name` (train_open, test_mixed, …), and its grey image.

    Raises:
        ValueError: for a name that ends in none of `FILES`.
    """
    task = name.rpartition("_")[2]
    if task not in FILES:
        raise ValueError(f"Invalid name={name!r} in make_row; it must end in one of {', '.join(FILES)}")
    rank = index
    if task == "mixed":
        task, rank = TASKS[index % len(TASKS)], index // len(TASKS)
    stream = (seed, zlib.crc32(name.encode()), TASKS.index(task))
    turns, rng = Turns(stream, rank), np.random.default_rng([*stream, 3, index])
    planner, writer = _MAKERS[task]
    plan = planner(turns, rng)
    pixels, box = render_with_box(plan.study, rng, IMAGE_SIZE)
    row = {
        "id": f"{name}-{index:05d}",
        "image": f"images/{name}/{index:05d}.png",
        **({} if task == "choice" else {"task": task}),
        **writer(plan, box, turns, rng),
        "modality": plan.study.modality,
    }
    return row, Image.fromarray(pixels)


def write_task_dataset(
    folder: Path, seed: int, tasks: Sequence[str] = FILES, *, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS
) -> dict[str, Path]:
    """Write train_TASK.jsonl and test_TASK.jsonl with their images, unless the folder has them.

    The whole folder appears at once, as with `rlmed.data.phantom.studies.write_dataset`. Replaces
    such data of another seed, size or version. Fewer rows are a prefix of more.

    Args:
        folder: of the data alone; created if missing.
        seed: the same seed gives the same bytes.
        tasks: some of `FILES`.
        train_rows: of each training file, modalities in turn.
        test_rows: of each test file.

    Returns:
        JSON Lines files by name, `train_open` and so on.

    Raises:
        ValueError: for an unknown task, no rows, or a folder that holds anything else.
        RecordError: if writing fails.
    """
    unknown = [task for task in tasks if task not in FILES]
    if unknown or not tasks or min(train_rows, test_rows) <= 0:
        raise ValueError(
            f"write_task_dataset got tasks={list(tasks)}, train_rows={train_rows}, test_rows={test_rows}: give some of "
            f"{', '.join(FILES)}, and at least one row"
        )
    folder = folder.resolve()
    rows = {f"{part}_{task}": count for task in tasks for part, count in (("train", train_rows), ("test", test_rows))}
    manifest = {"generator_version": GENERATOR_VERSION, "tasks_version": TASKS_VERSION, "seed": seed, "rows": rows}

    def is_outdated() -> bool:
        if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} holds files that are not generated questions of tasks: choose another folder")
        return not _is_whole(folder, manifest)

    if is_outdated():
        try:
            aside = partial_folder(folder)
            try:
                for name, count in rows.items():
                    _write_file(aside, name, seed, count)
                (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
                rename_into_place(aside, folder, may_replace=is_outdated)
            finally:
                remove(aside)  # left after an error, or if another process finished first
        except OSError as error:
            raise refusal(folder, error, advice="start again") from error
    return {name: folder / f"{name}.jsonl" for name in rows}


def _write_file(folder: Path, name: str, seed: int, rows: int) -> None:
    (folder / "images" / name).mkdir(parents=True)
    lines = []
    for index in range(rows):
        row, image = make_row(name, seed, index)
        image.save(folder / row["image"])
        lines.append(json.dumps(row) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Return whether the folder holds exactly this manifest's data, complete."""
    path = folder / MANIFEST
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != manifest:
        return False
    return all(
        (folder / f"{name}.jsonl").is_file()
        and sum(not is_litter(image.name) for image in (folder / "images" / name).glob("*.png")) == count
        for name, count in manifest["rows"].items()
    )
