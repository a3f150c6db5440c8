"""Summarise the judged answers of a file: shares of right ones, controls, image-free baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlmed.core.statistics import ImageFreePrior, chance, leave_one_out_prior, majority_letter
from rlmed.core.types import Example
from rlmed.data.loading import EvalFile
from rlmed.data.options.order import kept_orders
from rlmed.evaluation.records import Accuracy, Control, EvalRow
from rlmed.evaluation.results import FileSummary
from rlmed.evaluation.scores import Baselines, Scores, summarise_task


def summarise(file: EvalFile, rows: Sequence[EvalRow], train: Sequence[Example]) -> FileSummary:
    """Summarise the answers to a file's questions, controls included.

    Args:
        file: with its questions.
        rows: the judged answers to them.
        train: rows to fit the image-free prior on; may be empty.
    """
    by_task: dict[str, list[Example]] = {}
    for example in file.examples:
        by_task.setdefault(example.task, []).append(example)
    baselines = {name: Baselines.of(name, part, train) for name, part in by_task.items() if name != "choice"}
    parts = [
        _summarise(name, {name: part}, [row for row in rows if row.task == name], train, baselines)
        for name, part in by_task.items()
    ]
    return dataclasses.replace(
        _summarise(file.name, by_task, rows, train, baselines),
        tasks=tuple(summarise_task(rows, one) for one in baselines.values()),
        parts=tuple(parts) if len(parts) > 1 else (),
    )


def _summarise(
    name: str,
    by_task: Mapping[str, Sequence[Example]],
    rows: Sequence[EvalRow],
    train: Sequence[Example],
    baselines: Mapping[str, Baselines],
) -> FileSummary:
    """Summarise the answers to the questions of some tasks, without the tasks' scores."""
    plain = [row for row in rows if row.control == "none"]
    types = sorted({row.question_type for row in plain if row.question_type})
    by_type = {name: [row.correct for row in plain if row.question_type == name] for name in types}
    choices = by_task.get("choice", ())
    kept, option = kept_orders(example.options for example in choices)
    fitted = [example for example in train if example.is_choice]
    prior = ImageFreePrior.fit(fitted) if fitted else None
    shares = _Shares(choices, [baselines[task] for task in by_task if task != "choice"], by_task)
    return FileSummary(
        name=name,
        rows=len(plain),
        accuracy=Accuracy.of(sum(row.correct for row in plain), len(plain)),
        format_rate=float(np.mean([row.format for row in plain])),
        mean_tokens=float(np.mean([row.tokens for row in plain])),
        cut_by_length=float(np.mean([row.finish_reason == "length" for row in plain])),
        chance=shares.over_all(chance, lambda one: one.chance),
        majority_letter=majority_letter(choices, fitted) if choices else None,
        image_free_prior=shares.image_free(prior, by_rate=False),
        image_free_prior_by_rate=shares.image_free(prior, by_rate=True),
        leave_one_out_prior=shares.over_all(leave_one_out_prior, lambda one: one.own_prior),
        leave_one_out_prior_by_rate=shares.over_all(
            lambda rows: leave_one_out_prior(rows, by_rate=True), lambda one: one.own_prior
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
    )


@dataclass(frozen=True)
class _Shares:
    """Shares of right answers without an image, over the rows of some tasks."""

    choices: Sequence[Example]
    baselines: Sequence[Baselines]
    """Of the other tasks."""
    by_task: Mapping[str, Sequence[Example]]

    def over_all(
        self, of_choices: Callable[[Sequence[Example]], float], scores: Callable[[Baselines], Sequence[Scores] | None]
    ) -> float:
        """Return the share, from that of the choices and the other rows' scores."""
        parts = [(of_choices(self.choices), len(self.choices))] if self.choices else []
        parts += [(one.share_right(scores(one)), len(self.by_task[one.task.name])) for one in self.baselines]
        return sum(share * rows for share, rows in parts) / sum(rows for _, rows in parts)

    def image_free(self, prior: ImageFreePrior | None, *, by_rate: bool) -> float | None:
        """Return the share of the prior; None unless every task has training rows."""
        if (self.choices and prior is None) or any(one.prior is None for one in self.baselines):
            return None
        return self.over_all(
            lambda rows: 0.0 if prior is None else prior.accuracy(rows, by_rate=by_rate), lambda one: one.prior
        )


def _under(rows: Sequence[EvalRow], control: Control) -> Accuracy | None:
    correct = [row.correct for row in rows if row.control == control]
    return Accuracy.of(sum(correct), len(correct)) if correct else None
