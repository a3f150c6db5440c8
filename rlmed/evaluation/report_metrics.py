"""Scores of written answers by models, as `eval.report_metrics` names them, beside their task's."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rewards.embedding import Embedder
from rewards.radeval import ReportScores
from rewards.references import references_of
from rlmed.core.config.running import EMBEDDING, RADEVAL, EvalConfig
from rlmed.core.types import Example
from rlmed.data.loading import Dataset, EvalFile
from rlmed.evaluation.records import EvalRow

log = logging.getLogger(__name__)

KEY = "eval.report_metrics"
TASKS = {RADEVAL: ("report",), EMBEDDING: ("open", "report")}
"""Tasks whose rows get the score, by the kind of an entry."""
CHUNK = 64
"""Rows of a call."""
DEVICE = "cpu"
"""Where the encoder computes: engines and learner fill a GPU."""


class Comparison(Protocol):
    """A model that compares answers with references."""

    def load(self) -> None:
        """Load it; raise RewardError if that fails."""
        ...

    def compare(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return scores in [0, 1], best over each answer's references; NaN for none."""
        ...


@dataclass(frozen=True, slots=True)
class ReportMetric:
    """A score of rows with written answers."""

    entry: str
    """As the user wrote it."""
    name: str
    """Of the score."""
    tasks: tuple[str, ...]
    model: Comparison

    def score(self, rows: Sequence[EvalRow]) -> list[EvalRow]:
        """Return the rows with this score added to those of its tasks, 0 without an answer.

        A row whose answer the model gives no score has none. If the model fails, no row of the file
        has one: the answers took longer than this score is worth. Both give a warning.

        Args:
            rows: of one file, controls included.
        """
        meant = [at for at, row in enumerate(rows) if row.task in self.tasks]
        found = dict.fromkeys(meant, 0.0)
        answered = [at for at in meant if (rows[at].predicted or "").strip()]
        try:
            for start in range(0, len(answered), CHUNK):
                chunk = answered[start : start + CHUNK]
                answers = [str(rows[at].predicted) for at in chunk]
                found |= zip(chunk, self.model.compare(answers, [_references(rows[at]) for at in chunk]), strict=True)
        except Exception as error:  # models of several libraries
            why = " ".join(str(error).split())
            log.warning("%s: %s=%s failed: %s: %s", rows[meant[0]].file, KEY, self.entry, type(error).__name__, why)
            return list(rows)
        known = {at: score for at, score in found.items() if not math.isnan(score)}
        if lacking := len(found) - len(known):
            file = rows[meant[0]].file
            log.warning(
                "%s: %s=%s gives %d of %d answers no score: its mean is over the others",
                *(file, KEY, self.entry, lacking, len(found)),
            )
        return [
            dataclasses.replace(row, scores={**row.scores, self.name: known[at]}) if at in known else row
            for at, row in enumerate(rows)
        ]


def report_metrics(entries: Sequence[str], files: Sequence[EvalFile]) -> tuple[ReportMetric, ...]:
    """Return what `eval.report_metrics` names; their models are loaded by the first evaluation.

    Args:
        entries: "radeval:NAME" or "embedding:FOLDER" each.
        files: to evaluate; without any, nothing is made.

    Raises:
        ValueError: for a folder or a package that it lacks, or if no row gets the score.
    """
    tasks = sorted({example.task for file in files for example in file.examples})
    return tuple(_made(entry, tasks) for entry in entries) if tasks else ()


def check_report_metrics(settings: EvalConfig, data: Dataset) -> None:
    """Raise ValueError for what `report_metrics` refuses, before a model is loaded for a run."""
    report_metrics(settings.report_metrics, data.eval_files(settings.limit))


def _made(entry: str, tasks: Sequence[str]) -> ReportMetric:
    kind, _, given = entry.partition(":")
    if not {*TASKS[kind]} & {*tasks}:
        raise ValueError(
            f"{KEY}={entry} is for the task{'s' if len(TASKS[kind]) > 1 else ''} {', '.join(TASKS[kind])}, and data.eval has "
            f"{', '.join(tasks)}: leave it out"
        )
    where = f"{KEY}={kind}:"
    make: dict[str, Callable[[], Comparison]] = {
        RADEVAL: lambda: ReportScores(given, key=where),
        EMBEDDING: lambda: Embedder(given, batch_size=CHUNK, device=DEVICE, key=where),
    }
    return ReportMetric(entry, given if kind == RADEVAL else EMBEDDING, TASKS[kind], make[kind]())


def _references(row: EvalRow) -> list[str]:
    return references_of(Example(row.id, None, row.question, task=row.task, truth=row.truth))
