"""Scores of tasks other than multiple choice: means, intervals, controls, image-free baselines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlmed.core.types import Example, FloatArray
from rlmed.evaluation.records import Control, EvalRow
from rlmed.tasks.base import Task
from rlmed.tasks.registry import task_named

RESAMPLES = 1000
"""Of rows, for the interval of a mean."""
FILE_RESAMPLES = 200
"""Of rows, for the interval of a figure over a file, which takes longer."""
CANDIDATES, FITTED = 20, 60
"""Most answers and rows that are compared for the best constant answer to a question."""
OTHERS = 5
"""Answers of other rows, drawn for each row, whose mean score is chance."""
_SEED = 0

Scores = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure in [0, 1] and its 95 % interval, by bootstrap over rows (Efron 1979, percentiles).

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
    chance: dict[str, float]
    """Mean scores of the right answers of other rows of the same kind."""
    own_prior: dict[str, float]
    """As `prior`, each half of the file answered by what is best on the other half."""
    prior: dict[str, float] | None
    """Scores of the answer that is best on training rows with the same question, else of the same
    kind, else of all: an image-free baseline; None without training rows of the task.
    """


def summarise_task(
    name: str, rows: Sequence[EvalRow], examples: Sequence[Example], train: Sequence[Example]
) -> TaskSummary:
    """Summarise the answers to one task in one file.

    Args:
        name: of the task.
        rows: the file's judged answers, controls included.
        examples: the file's rows of the task.
        train: training rows, of any task.
    """
    task = task_named(name)
    by_control: dict[Control, list[EvalRow]] = defaultdict(list)
    for row in rows:
        if row.task == name:
            by_control[row.control].append(row)
    plain = by_control.pop("none")
    fitted = [example for example in train if example.task == name]
    return TaskSummary(
        name=name,
        rows=len(plain),
        main=task.main,
        scores=_means(task, plain),
        over_file=_over_file(task, plain),
        controls={control: _means(task, answers) for control, answers in by_control.items()},
        chance=_mean_scores(chance_scores(task, examples)),
        own_prior=_mean_scores(own_prior_scores(task, examples)),
        prior=_mean_scores(prior_scores(task, examples, fitted)) if fitted else None,
    )


def _means(task: Task, rows: Sequence[EvalRow]) -> dict[str, Estimate]:
    return {name: _estimate(np.array([row.scores[name] for row in rows])) for name in task.score_names}


def _estimate(values: FloatArray | np.ndarray[Any, Any]) -> Estimate:
    draws = np.random.default_rng(_SEED).integers(len(values), size=(RESAMPLES, len(values)))
    return _interval(float(values.mean()), values[draws].mean(1))


def _over_file(task: Task, rows: Sequence[EvalRow]) -> dict[str, Estimate]:
    answers = [(row.predicted, row.truth) for row in rows]
    values = task.over_file(answers)
    if not values:
        return {}
    random = np.random.default_rng(_SEED)
    drawn = [
        task.over_file([answers[i] for i in random.integers(len(answers), size=len(answers))])
        for _ in range(FILE_RESAMPLES)
    ]
    # a resample without anything to find has no figures
    return {name: _interval(value, [one[name] for one in drawn if name in one]) for name, value in values.items()}


def _interval(value: float, resampled: Any) -> Estimate:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def chance_scores(task: Task, examples: Sequence[Example]) -> list[Scores]:
    """Return the scores of right answers of other rows of its kind, `OTHERS` drawn for each row."""
    random = np.random.default_rng(_SEED)
    kinds: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        kinds[example.kind].append(index)
    found: list[Scores] = []
    for index, example in enumerate(examples):
        others = [other for other in kinds[example.kind] if other != index]
        others = others or [other for other in range(len(examples)) if other != index]
        if not others:
            return [_score(task, task.write(example.truth), example)]  # the only row
        drawn = random.integers(len(others), size=OTHERS)
        found += [_score(task, task.right_answer(examples[others[i]]), example) for i in drawn]
    return found


def prior_scores(task: Task, examples: Sequence[Example], train: Sequence[Example]) -> list[Scores]:
    """Return each row's scores of the best constant answer; see `TaskSummary.prior`."""
    answer = best_answers(task, train)
    return [_score(task, answer(example), example) for example in examples]


def own_prior_scores(task: Task, examples: Sequence[Example]) -> list[Scores]:
    """Return `prior_scores`, each half of the rows (every other one) by the other half."""
    if len(examples) < 2:
        return chance_scores(task, examples)
    halves = examples[::2], examples[1::2]
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
    """Return the right answer of a row that scores highest over all rows; ties: the first."""
    random = np.random.default_rng(_SEED)
    fitted = [rows[i] for i in sorted(random.permutation(len(rows))[:FITTED])]
    candidates = list(dict.fromkeys(task.right_answer(row) for row in fitted))[:CANDIDATES]
    return max(candidates, key=lambda text: float(np.mean([_score(task, text, row)[task.main] for row in fitted])))


def _score(task: Task, answer: str, example: Example) -> Scores:
    return task.score(answer, example.truth) or dict.fromkeys(task.score_names, 0.0)


def _mean_scores(scores: Sequence[Scores]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}


def share_right(task: Task, scores: Sequence[Scores]) -> float:
    """Return the share of rows whose main score counts as right."""
    return float(np.mean([task.passes(one[task.main]) for one in scores]))
