"""Read a run's evaluations for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmed.evaluation.faithfulness import Faithfulness, read_faithfulness
from rlmed.evaluation.kits.rule_scores import RuleScore, read_scores
from rlmed.evaluation.records import EvalRow
from rlmed.evaluation.reliability.results import ReliabilitySummary
from rlmed.evaluation.results import EvalSummary, evaluation_folders, last_evaluation, read_comparison, read_rows


@dataclass(frozen=True, slots=True)
class Evaluations:
    """A run's evaluations, by step, and the rows of the first and the last."""

    summaries: tuple[EvalSummary, ...]
    first_rows: tuple[EvalRow, ...]
    """Empty if there is only one evaluation."""
    last_rows: tuple[EvalRow, ...]
    comparison: Mapping[str, Any] | None
    """Comparison of the last evaluation with one of another run, if requested."""
    sft: EvalSummary | None
    """The supervised baseline on the same files, if given."""
    reliability: ReliabilitySummary | None
    """The latest one."""
    faithfulness: tuple[Faithfulness, ...]
    """Of the last evaluation, as the next; empty if it wrote none."""
    rules: tuple[RuleScore, ...]

    @classmethod
    def read(cls, folder: Path, sft: Path | None) -> Evaluations:
        """Read the evaluations in a folder of step folders.

        Args:
            folder: may be missing.
            sft: run folder of the supervised baseline.

        Raises:
            ValueError: if a file is damaged, or the baseline has no evaluation.
        """
        folders = evaluation_folders(folder)
        ends = folders[:1] + folders[-1:] if len(folders) > 1 else folders
        rows = [tuple(read_rows(path)) for path in ends]
        measured = [found for path in folders if (found := ReliabilitySummary.read(path))]
        return cls(
            summaries=tuple(EvalSummary.read(path) for path in folders),
            first_rows=rows[0] if len(rows) > 1 else (),
            last_rows=rows[-1] if rows else (),
            comparison=read_comparison(folders[-1]) if len(folders) == 1 else None,
            sft=None if sft is None else EvalSummary.read(last_evaluation(sft)),
            reliability=measured[-1] if measured else None,
            faithfulness=read_faithfulness(folders[-1]) if folders else (),
            rules=read_scores(folders[-1]) if folders else (),
        )

    @property
    def ends(self) -> tuple[EvalSummary, ...]:
        """The first and the last evaluation, or the only one."""
        return self.summaries if len(self.summaries) < 2 else (self.summaries[0], self.summaries[-1])
