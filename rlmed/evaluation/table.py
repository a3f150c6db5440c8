"""The results of an evaluation as a terminal table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from rlmed.data.options.order import kept_order_text
from rlmed.evaluation.narrow import FigureTable
from rlmed.evaluation.records import Accuracy, p_value_text
from rlmed.evaluation.results import EvalSummary, FileSummary


def summary_table(before: EvalSummary | None, after: EvalSummary, comparison: Mapping[str, Any] | None) -> Table:
    """Build the table, two lines per file: accuracy and format before and after, p-value, controls.

    All in per cent, with Wilson 95 % intervals. Below a file with several tasks, each task's rows
    alone. Controls and prior are those of `after`, with the number of rows where a control could
    not be asked on all; the prior stands below chance. Without training rows to fit it on, it is
    the leave-one-out prior, marked "loo".
    """
    if before is None:
        span = f"step {after.step}" if after.step else after.model
    elif before.step == after.step:  # two separate evaluations
        span = f"{before.model} → {after.model}"
    else:
        span = f"step {before.step} → {after.step}"
    legend = [*_legend(after, tested=comparison is not None), *_remarks(after)]
    table = FigureTable(f"Held-out accuracy in %, {span}", legend)
    rows = []
    earlier = {file.name: file for file in before.files} if before is not None else {}
    tests = comparison["files"] if comparison is not None else {}
    for file in after.files:
        old, test = earlier.get(file.name), tests.get(file.name)
        rows.append((f"{file.name}\n{file.rows} rows", _cells(file, old, test)))
        olds = {part.name: part for part in old.parts} if old else {}
        tested = (test or {}).get("tasks", {})
        for part in file.parts:
            label = f"· {part.name}\n  {part.rows} rows"
            rows.append((label, _cells(part, olds.get(part.name), tested.get(part.name))))
    headings = ("accuracy", "p", "format", "blank", "shuffled", "other\norder", "chance\nprior")
    table.add_rows("file", headings, rows)
    return table


def _cells(file: FileSummary, old: FileSummary | None, test: Mapping[str, Any] | None) -> list[str]:
    """Return the cells of a file, or of its rows of one task, behind the label."""
    return [
        _change([_percent(one.accuracy.value) + "\n" + _interval(one.accuracy) for one in (old, file) if one]),
        p_value_text(test["p_value"]) if test else "–",
        _change([_percent(one.format_rate) for one in (old, file) if one]),
        *(_control(control, file.rows) for control in _controls(file)),
        f"{_percent(file.chance)}\n{_prior(file)}",
    ]


def _controls(file: FileSummary) -> tuple[Accuracy | None, ...]:
    return file.blank, file.shuffled, file.other_order


def _control(control: Accuracy | None, rows: int) -> str:
    if control is None:
        return "–"
    cell = f"{_percent(control.value)}\n{_interval(control)}"
    return cell if control.rows == rows else f"{cell}\nn={control.rows}"


def _legend(summary: EvalSummary, *, tested: bool) -> list[str]:
    """Explain the columns."""
    lines = ["small figures: Wilson 95 % intervals" + ("; p: McNemar, exact, paired" if tested else "")]
    if any(file.blank or file.shuffled for file in summary.files):
        lines.append("blank, shuffled: on a grey picture, on another row's")
    if any(file.reordered for file in summary.files):
        lines.append("other order: with the options in another order")
    shown = [(line, control) for file in summary.files for line in (file, *file.parts) for control in _controls(line)]
    if any(control and control.rows != line.rows for line, control in shown):
        lines.append("n: rows that the control was asked on, where not on all")
    if any(file.tasks for file in summary.files):
        lines.append(
            "prior of other tasks: the one best answer to a question without its image (loo: of half the file)"
        )
    if all(file.majority_letter is None for file in summary.files):
        return lines  # no multiple choice
    if any(file.image_free_prior is None for file in summary.files):
        where = "in the other rows of the file (loo, leave one out), without training rows"
        lines.append(f"prior: the option text most often right {where}")
    else:
        lines.append("prior: the option text most often right in the training rows")
    return lines


def _remarks(summary: EvalSummary) -> list[str]:
    """Return remarks on files: several pictures, letters not offered, rows not reordered."""
    lines = [(file.name, file) for file in summary.files if not file.parts]
    lines += [(f"{file.name}, {part.name}", part) for file in summary.files for part in file.parts]
    several = [
        f"{name}, {line.blank_one.rows} rows with several pictures: {', '.join(_several(line))}"
        for name, line in lines
        if line.blank_one
    ]
    letters = [
        f"{name}: {_percent(line.not_offered)} % answer a letter that was not offered: never right, whatever the format"
        for name, line in lines
        if line.not_offered
    ]
    orders = [
        f"{name}: {kept_order_text(line.kept_order, line.rows, line.kept_order_by)}"
        for name, line in lines
        if line.kept_order
    ]
    return several + letters + orders


def _several(file: FileSummary) -> Iterator[str]:
    """Yield the figures of the controls that are for questions about several pictures."""
    for accuracy, shown in ((file.blank_one, "one of them grey"), (file.image_order, "in another order")):
        if accuracy:
            yield f"{shown} {_percent(accuracy.value)} ({_interval(accuracy)})"


def _prior(file: FileSummary) -> str:
    if file.image_free_prior is None:
        return _percent(file.leave_one_out_prior) + "\nloo"
    return _percent(file.image_free_prior)


def _change(cells: Sequence[str]) -> str:
    """Join cells line by line with an arrow."""
    return "\n".join(" → ".join(lines) for lines in zip(*(cell.split("\n") for cell in cells), strict=True))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.low:.0f}–{100 * accuracy.high:.0f}"
