"""Measure whether answers depend on the picture, by the names of a published evaluation.

Zafar, Murali and Vashist 2026 (arXiv 2603.03437) ask each question on its own picture, on a grey
one and on another question's. Of that paper we have the abstract and its authors' summary in words
(labscommunity.cohere.com/blog/2026/visual-grounding-medical-vlms), no formulas: visual reliance,
image sensitivity and hallucinated reasoning are that summary written as formulas. How their "visual
claims" were found is not known to us; the rule here is ours (`rlmed.tasks.metrics.claims`), and so
is whatever is over the grey picture.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlmed.core.calibration import Estimate
from rlmed.core.config.building import build_record
from rlmed.core.files.atomic import replace_text
from rlmed.core.files.damage import read_json
from rlmed.core.prefill import ANSWER
from rlmed.evaluation.records import Accuracy, Control, EvalRow
from rlmed.tasks.metrics.claims import claims_to_see
from rlmed.tasks.registry import task_named

FAITHFULNESS_FILE = "faithfulness.json"

Pairs = Sequence[tuple[EvalRow, EvalRow]]
"""A question's row on its own picture, and its row on a control's."""


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """How far the answers to one task in one file depend on the picture (docs/reliability.md).

    Shares of questions have Wilson's interval, differences that of a mean of paired differences
    (`rlmed.core.calibration.mean_interval`); both 95 %. None without the control, or without a
    question that the figure is about.
    """

    file: str
    task: str
    rows: int
    """Questions asked on a control, too."""
    visual_reliance: Estimate | None
    """Mean of the main score on the own picture minus that on another question's."""
    blank_reliance: Estimate | None
    """The same, minus that on a grey picture."""
    lost: Accuracy | None
    """Right answers on the own picture that are wrong on the grey one, of all right ones."""
    image_sensitivity: Accuracy | None
    """Questions with another answer on another question's picture."""
    blank_sensitivity: Accuracy | None
    """Questions with another answer on the grey picture."""
    visual_claims: Accuracy | None
    """Completions on the own picture whose reasoning presents something as seen."""
    hallucinated_reasoning: Accuracy | None
    """Those whose answer is the same on another question's picture, of all completions."""
    blank_claims: Accuracy | None
    """Completions on the grey picture whose reasoning presents something as seen."""
    blank_answers: Accuracy | None
    """Answers on the grey picture that assert a finding, where the question allows another."""


def measure_faithfulness(rows: Sequence[EvalRow]) -> tuple[Faithfulness, ...]:
    """Return the figures of each file and task whose questions were asked on a control, too.

    Args:
        rows: an evaluation's, controls included.
    """
    groups: dict[tuple[str, str], list[EvalRow]] = {}
    for row in rows:
        groups.setdefault((row.file, row.task), []).append(row)
    found = (_of_task(file, task, part) for (file, task), part in groups.items())
    return tuple(one for one in found if one is not None)


def _of_task(file: str, task: str, rows: Sequence[EvalRow]) -> Faithfulness | None:
    shuffled, blank = _pairs(rows, "shuffled"), _pairs(rows, "blank")
    asked = {own.id for own, _ in (*shuffled, *blank)}
    if not asked:
        return None
    claims = [claims_to_see(_reasoning(own)) for own, _ in shuffled]
    stays = [not _differs(own, other) for own, other in shuffled]
    definite = [_asserts(other) for _, other in blank]
    return Faithfulness(
        file=file,
        task=task,
        rows=len(asked),
        visual_reliance=_difference(shuffled),
        blank_reliance=_difference(blank),
        lost=_share(not other.correct for own, other in blank if own.correct),
        image_sensitivity=_share(not same for same in stays),
        blank_sensitivity=_share(_differs(own, other) for own, other in blank),
        visual_claims=_share(claims),
        hallucinated_reasoning=_share(claim and same for claim, same in zip(claims, stays, strict=True)),
        blank_claims=_share(claims_to_see(_reasoning(other)) for _, other in blank),
        blank_answers=_share(one for one in definite if one is not None),
    )


def _pairs(rows: Sequence[EvalRow], control: Control) -> Pairs:
    own = {row.id: row for row in rows if row.control == "none"}
    return [(own[row.id], row) for row in rows if row.control == control]


def _difference(pairs: Pairs) -> Estimate | None:
    if not pairs:
        return None
    return Estimate.mean([_score(own) - _score(other) for own, other in pairs], bounds=(-1.0, 1.0))


def _score(row: EvalRow) -> float:
    """Return the main score; of a choice, whether it is right."""
    return float(row.correct) if row.task == "choice" else row.scores[task_named(row.task).main]


def _answer(row: EvalRow) -> str | None:
    return row.predicted_letter if row.task == "choice" else row.predicted


def _differs(own: EvalRow, other: EvalRow) -> bool:
    """Return whether the answers differ; if neither can be read, they don't."""
    first, second = _answer(own), _answer(other)
    if first is None or second is None:
        return first is not second
    truths = (own.truth,) if own.truth == other.truth else (own.truth, other.truth)
    return not task_named(own.task).same(first, second, *truths)


def _asserts(row: EvalRow) -> bool | None:
    """Return whether the answer asserts a finding; an unreadable one doesn't."""
    answer = _answer(row)
    asserts = task_named(row.task).asserts(answer or "", row.truth, row.options)
    return None if asserts is None else answer is not None and asserts


def _reasoning(row: EvalRow) -> str:
    return row.completion.partition(ANSWER)[0].replace("<think>", "").replace("</think>", "")


def _share(of: Iterable[bool]) -> Accuracy | None:
    values = np.fromiter(of, dtype=bool)
    return Accuracy.of(int(values.sum()), len(values)) if len(values) else None


def write_faithfulness(step_folder: Path, found: Sequence[Faithfulness]) -> None:
    """Write `faithfulness.json` into the folder of an evaluation; nothing without any figures.

    Raises:
        OSError: if the write fails.
    """
    if found:
        content = {"tasks": [dataclasses.asdict(one) for one in found]}
        replace_text(step_folder / FAITHFULNESS_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_faithfulness(step_folder: Path) -> tuple[Faithfulness, ...]:
    """Read `faithfulness.json` from the folder of an evaluation; () without it."""
    path = step_folder / FAITHFULNESS_FILE
    if not path.is_file():
        return ()
    content: Mapping[str, list[Mapping[str, object]]] = read_json(path)
    return tuple(build_record(Faithfulness, one) for one in content["tasks"])
