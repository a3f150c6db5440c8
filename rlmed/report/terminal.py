"""End a command: write the run's report, print its results and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from rlmed.core.process.display import output
from rlmed.evaluation.results import ROWS_FILE, EvalSummary, compare, step_folder
from rlmed.evaluation.score_table import score_table
from rlmed.evaluation.table import summary_table
from rlmed.recording.checkpoint import list_checkpoints
from rlmed.report.page import write_report

WIDTH = len("checkpoint: ")


def show_results(
    run_folder: Path, step: int, *, before: Path | None, more: Sequence[Table] = (), note: str = ""
) -> None:
    """Write the report; print the accuracy after `step`, further tables and the paths written.

    Args:
        run_folder: run folder of any command.
        step: step of the evaluation to show; without one, only the paths are printed.
        before: folder of an earlier evaluation to compare it with, if it exists.
        more: further tables.
        note: a remark below the tables.
    """
    after = step_folder(run_folder / "evaluations", step)
    tables, paths = list(more), {}
    if after.is_dir():
        earlier, comparison = None, None
        if before is not None and before.is_dir():
            earlier, comparison = EvalSummary.read(before), compare(before, after)
        summary = EvalSummary.read(after)
        scores = score_table(earlier, summary, comparison)
        tables = [summary_table(earlier, summary, comparison), *([scores] if scores else []), *tables]
        paths["rows"] = after / ROWS_FILE
    paths["report"] = write_report(run_folder)
    if checkpoints := list_checkpoints(run_folder / "checkpoints"):
        paths["checkpoint"] = checkpoints[-1]
    console = output()
    for table in tables:
        console.print(table)
    if note:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    for label, path in paths.items():
        console.print(f"{label + ':':{WIDTH}}{path}", soft_wrap=True, markup=False)
