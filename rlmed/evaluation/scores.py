"""Scores of tasks other than multiple choice: means, intervals, controls, image-free baselines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlmed.core.calibration import equal_interval, mean_interval
from rlmed.core.types import Example
from rlmed.evaluation.records import Control, EvalRow
from rlmed.tasks.base import Task, columns
from rlmed.tasks.registry import task_named

RESAMPLES = 1000
"""Of rows, for intervals."""
CANDIDATES, FITTED = 20, 60
"""Most answers and rows that are compared for the best constant answer to a question."""
OTHERS = 5
"""Answers of other rows, drawn for each row, whose mean score is chance."""
_SEED = 0

Scores = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure in [0, 1] and its 95 % interval over rows.

    Of a mean by `rlmed.core.calibration.mean_interval`; of another figure by bootstrap (Efron 1979,
    percentiles), or, if no resample changes it, as that of equal values.

    Example:
        >>> Estimate(value=0.61, low=0.55, high=0.67).value
        0.61
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """Scores of a file's rows of one task; each is a mean over rows unless said otherwise."""

    name: str
    rows: int
    main: str
    """Name of the score that the reward `task` pays."""
    scores: dict[str, Estimate]
    over_file: dict[str, Estimate]
    """Figures that are no mean over rows, such as mAP."""
    controls: dict[str, dict[str, Estimate]]
    """Scores by control and name."""
    chance: dict[str, float] | None
    """Mean scores of the right answers of other rows of the same kind; None for a single row."""
    own_prior: dict[str, float] | None
    """As `prior`, each half of the rows answered by what is best on the other; None for one row."""
    prior: dict[str, float] | None
    """Scores of the answer that is best on training rows with the same question, else of the same
    kind, else of all: an image-free baseline; None without training rows of the task.
    """
    control_rows: dict[str, int] = field(default_factory=dict)
    """Rows that each control was asked on; earlier versions did not record them."""


@dataclass(frozen=True)
class Baselines:
    """Scores of one task's rows without their images, row by row; None where there are none."""

    task: Task
    chance: Sequence[Scores] | None
    own_prior: Sequence[Scores] | None
    prior: Sequence[Scores] | None

    @classmethod
    def of(cls, name: str, examples: Sequence[Example], train: Sequence[Example]) -> Baselines:
        """Compute them.

        Args:
            name: of the task.
            examples: a file's rows of the task.
            train: training rows, of any task.
        """
        task = task_named(name)
        fitted = [example for example in train if example.task == name]
        return cls(
            task=task,
            chance=chance_scores(task, examples),
            own_prior=own_prior_scores(task, examples),
            prior=prior_scores(task, examples, fitted) if fitted else None,
        )

    def share_right(self, scores: Sequence[Scores] | None) -> float:
        """Return the share of scores whose main one counts as right; 0 without any."""
        return float(np.mean([self.task.passes(one[self.task.main]) for one in scores])) if scores else 0.0


def summarise_task(rows: Sequence[EvalRow], baselines: Baselines) -> TaskSummary:
    """Summarise the answers to one task in one file.

    Args:
        rows: the file's judged answers, controls included.
        baselines: of the file's rows of the task.
    """
    task = baselines.task
    by_control: dict[Control, list[EvalRow]] = defaultdict(list)
    for row in rows:
        if row.task == task.name:
            by_control[row.control].append(row)
    plain = by_control.pop("none")
    return TaskSummary(
        name=task.name,
        rows=len(plain),
        main=task.main,
        scores=_means(task, plain),
        over_file=_over_file(task, plain),
        controls={control: _means(task, answers) for control, answers in by_control.items()},
        chance=_mean_scores(baselines.chance),
        own_prior=_mean_scores(baselines.own_prior),
        prior=_mean_scores(baselines.prior),
        control_rows={control: len(answers) for control, answers in by_control.items()},
    )


def _means(task: Task, rows: Sequence[EvalRow]) -> dict[str, Estimate]:
    """Return the task's scores, then those that models gave rows, which some may lack."""
    found = columns(row.scores for row in rows)
    names = dict.fromkeys((*task.score_names, *found))
    return {name: _estimate(found[name]) for name in names}


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(float(np.mean(values)), *mean_interval(values))


def _over_file(task: Task, rows: Sequence[EvalRow]) -> dict[str, Estimate]:
    answers = [(row.predicted, row.truth) for row in rows]
    values = task.over_file(answers)
    if not values:
        return {}
    draws = np.random.default_rng(_SEED).integers(len(answers), size=(RESAMPLES, len(answers)))
    draws.sort(axis=1)  # order matters to mAP, so it is kept
    drawn = task.over_resamples(answers, draws)  # a resample without anything to find has no figures
    return {name: _interval(value, drawn[name], len(rows)) for name, value in values.items()}


def _interval(value: float, resampled: Any, rows: int) -> Estimate:
    low, high = np.percentile(resampled, (2.5, 97.5))
    if high - low < 1e-12:
        low, high = equal_interval(value, rows)
    return Estimate(value, float(low), float(high))


def chance_scores(task: Task, examples: Sequence[Example]) -> list[Scores] | None:
    """Return the scores of right answers of other rows of its kind, `OTHERS` drawn for each row.

    None for a single row. A row that is alone of its kind gets answers of other kinds.
    """
    if len(examples) < 2:
        return None
    random = np.random.default_rng(_SEED)
    kinds: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        kinds[example.kind].append(index)
    found: list[Scores] = []
    for index, example in enumerate(examples):
        others = [other for other in kinds[example.kind] if other != index]
        others = others or [other for other in range(len(examples)) if other != index]
        drawn = random.integers(len(others), size=OTHERS)
        found += [_score(task, task.right_answer(examples[others[i]]), example) for i in drawn]
    return found


def prior_scores(task: Task, examples: Sequence[Example], train: Sequence[Example]) -> list[Scores]:
    """Return each row's scores of the best constant answer; see `TaskSummary.prior`."""
    answer = best_answers(task, train)
    return [_score(task, answer(example), example) for example in examples]


def own_prior_scores(task: Task, examples: Sequence[Example]) -> list[Scores] | None:
    """Return `prior_scores`, each half of the rows by the other half; None for a single row.

    The halves are drawn, each with half of the rows of a kind: rows may come in turns.
    """
    if len(examples) < 2:
        return None
    drawn = np.random.default_rng(_SEED).permutation(len(examples))
    ordered = sorted((examples[i] for i in drawn), key=lambda example: example.kind)
    halves = ordered[::2], ordered[1::2]
    return [*prior_scores(task, halves[0], halves[1]), *prior_scores(task, halves[1], halves[0])]


def best_answers(task: Task, train: Sequence[Example]) -> Callable[[Example], str]:
    """Return what gives an example's best constant answer: that with the highest main score."""
    known: dict[tuple[str, str], list[Example]] = defaultdict(list)
    for example in train:
        for key in _keys(example):
            known[key].append(example)
    best: dict[tuple[str, str], str] = {}

    def answer(example: Example) -> str:
        key = next(key for key in _keys(example) if key in known)
        if key not in best:
            best[key] = _best(task, known[key])
        return best[key]

    return answer


def _keys(example: Example) -> tuple[tuple[str, str], ...]:
    return ("question", " ".join(example.question.casefold().split())), ("kind", example.kind), ("all", "")


def _best(task: Task, rows: Sequence[Example]) -> str:
    """Return the right answer, of the most frequent ones, that scores highest; ties: the first."""
    random = np.random.default_rng(_SEED)
    fitted = [rows[i] for i in sorted(random.permutation(len(rows))[:FITTED])]
    frequent = Counter(task.right_answer(row) for row in rows).most_common(CANDIDATES)
    return max(
        (text for text, _ in frequent),
        key=lambda text: float(np.mean([_score(task, text, row)[task.main] for row in fitted])),
    )


def _score(task: Task, answer: str, example: Example) -> Scores:
    return task.score(answer, example.truth) or dict.fromkeys(task.score_names, 0.0)


def _mean_scores(scores: Sequence[Scores] | None) -> dict[str, float] | None:
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]} if scores else None
