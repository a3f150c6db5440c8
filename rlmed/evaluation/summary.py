"""Summarise the judged answers of a file: shares of right ones, controls, image-free baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlmed.core.statistics import ImageFreePrior, chance, leave_one_out_prior, majority_letter
from rlmed.core.types import Example
from rlmed.data.loading import EvalFile
from rlmed.data.options.order import kept_orders
from rlmed.evaluation.records import Accuracy, Control, EvalRow
from rlmed.evaluation.results import FileSummary
from rlmed.evaluation.scores import (
    Scores,
    chance_scores,
    own_prior_scores,
    prior_scores,
    share_right,
    summarise_task,
)
from rlmed.tasks.base import Task
from rlmed.tasks.registry import task_named


def summarise(file: EvalFile, rows: Sequence[EvalRow], train: Sequence[Example]) -> FileSummary:
    """Summarise the answers to a file's questions, controls included.

    Args:
        file: with its questions.
        rows: the judged answers to them.
        train: rows to fit the image-free prior on; may be empty.
    """
    plain = [row for row in rows if row.control == "none"]
    types = sorted({row.question_type for row in plain if row.question_type})
    by_type = {name: [row.correct for row in plain if row.question_type == name] for name in types}
    choices, others = _by_task(file.examples)
    kept, option = kept_orders(example.options for example in choices)
    fitted = [example for example in train if example.is_choice]
    prior = ImageFreePrior.fit(fitted) if fitted else None

    baselines = _Baselines(choices, others, train, prior)
    return FileSummary(
        name=file.name,
        rows=len(plain),
        accuracy=Accuracy.of(sum(row.correct for row in plain), len(plain)),
        format_rate=float(np.mean([row.format for row in plain])),
        mean_tokens=float(np.mean([row.tokens for row in plain])),
        cut_by_length=float(np.mean([row.finish_reason == "length" for row in plain])),
        chance=baselines.share(chance, chance_scores),
        majority_letter=majority_letter(choices, fitted) if choices else None,
        image_free_prior=baselines.image_free(by_rate=False),
        image_free_prior_by_rate=baselines.image_free(by_rate=True),
        leave_one_out_prior=baselines.share(leave_one_out_prior, own_prior_scores),
        leave_one_out_prior_by_rate=baselines.share(
            lambda rows: leave_one_out_prior(rows, by_rate=True), own_prior_scores
        ),
        blank=_under(rows, "blank"),
        shuffled=_under(rows, "shuffled"),
        by_question_type={name: (sum(correct), len(correct)) for name, correct in by_type.items()},
        reordered=_under(rows, "reordered"),
        blank_one=_under(rows, "blank_one"),
        image_order=_under(rows, "image_order"),
        kept_order=kept,
        kept_order_by=option,
        not_offered=float(np.mean([row.not_offered for row in plain])),
        tasks=tuple(summarise_task(name, rows, examples, train) for name, examples in others.items()),
    )


@dataclass(frozen=True)
class _Baselines:
    """Shares of right answers without an image, over a file's rows of all tasks."""

    choices: Sequence[Example]
    others: Mapping[str, Sequence[Example]]
    train: Sequence[Example]
    prior: ImageFreePrior | None

    def share(
        self,
        of_choices: Callable[[Sequence[Example]], float],
        scores: Callable[[Task, Sequence[Example]], Sequence[Scores]],
    ) -> float:
        """Return the share, from that of the choices and the other rows' scores."""
        parts = [(of_choices(self.choices), len(self.choices))] if self.choices else []
        for name, examples in self.others.items():
            task = task_named(name)
            parts.append((share_right(task, scores(task, examples)), len(examples)))
        return sum(share * rows for share, rows in parts) / sum(rows for _, rows in parts)

    def image_free(self, *, by_rate: bool) -> float | None:
        """Return the share of the prior; None unless every task has training rows."""
        tasks = {*self.others, *(["choice"] if self.choices else [])}
        if not tasks <= {example.task for example in self.train}:
            return None
        prior = self.prior
        return self.share(
            lambda rows: 0.0 if prior is None else prior.accuracy(rows, by_rate=by_rate),
            lambda task, rows: prior_scores(task, rows, [one for one in self.train if one.task == task.name]),
        )


def _by_task(examples: Sequence[Example]) -> tuple[list[Example], dict[str, list[Example]]]:
    """Return the multiple-choice examples, and the others by task."""
    others: dict[str, list[Example]] = {}
    for example in examples:
        if not example.is_choice:
            others.setdefault(example.task, []).append(example)
    return [example for example in examples if example.is_choice], others


def _under(rows: Sequence[EvalRow], control: Control) -> Accuracy | None:
    correct = [row.correct for row in rows if row.control == control]
    return Accuracy.of(sum(correct), len(correct)) if correct else None
