"""The results of an evaluation as a terminal table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from rlmed.data.options.order import kept_order_text
from rlmed.evaluation.records import Accuracy, p_value_text
from rlmed.evaluation.results import EvalSummary, FileSummary


def summary_table(before: EvalSummary | None, after: EvalSummary, comparison: Mapping[str, Any] | None) -> Table:
    """Build the table, two lines per file: accuracy and format before and after, p-value, controls.

    All in per cent, with Wilson 95 % intervals. Controls and prior are those of `after`; the prior
    stands below chance. Without training rows to fit it on, it is the leave-one-out prior, marked
    "loo".
    """
    if before is None:
        span = f"step {after.step}" if after.step else after.model
    elif before.step == after.step:  # two separate evaluations
        span = f"{before.model} → {after.model}"
    else:
        span = f"step {before.step} → {after.step}"
    table = Table(
        title=Text(f"Held-out accuracy in %, {span}"),
        caption=Text("\n".join([*_legend(after, tested=comparison is not None), *_remarks(after)]), justify="left"),
        # lines between the columns would not leave room for the figures in 80 characters
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("file", overflow="fold")
    for heading in ("accuracy", "p", "format", "blank", "shuffled", "other\norder", "chance\nprior"):
        table.add_column(heading, justify="right", no_wrap=True)
    earlier = {file.name: file for file in before.files} if before is not None else {}
    tests = comparison["files"] if comparison is not None else {}
    for file in after.files:
        old = earlier.get(file.name)
        table.add_row(
            f"{file.name}\n{file.rows} rows",
            _change([_percent(one.accuracy.value) + "\n" + _interval(one.accuracy) for one in (old, file) if one]),
            p_value_text(tests[file.name]["p_value"]) if file.name in tests else "–",
            _change([_percent(one.format_rate) for one in (old, file) if one]),
            *(
                "–" if one is None else _percent(one.value) + "\n" + _interval(one)
                for one in (file.blank, file.shuffled, file.reordered)
            ),
            f"{_percent(file.chance)}\n{_prior(file)}",
        )
    return table


def _legend(summary: EvalSummary, *, tested: bool) -> list[str]:
    """Explain the columns."""
    lines = ["small figures: Wilson 95 % intervals" + ("; p: McNemar, exact, paired" if tested else "")]
    if any(file.blank or file.shuffled for file in summary.files):
        lines.append("blank, shuffled: on a grey picture, on another row's")
    if any(file.reordered for file in summary.files):
        lines.append("other order: with the options in another order")
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
    several = [
        f"{file.name}, {file.blank_one.rows} rows with several pictures: {', '.join(_several(file))}"
        for file in summary.files
        if file.blank_one
    ]
    letters = [
        f"{file.name}: {_percent(file.not_offered)} % answer a letter that was not offered: never right, whatever the format"
        for file in summary.files
        if file.not_offered
    ]
    orders = [
        f"{file.name}: {kept_order_text(file.kept_order, file.rows, file.kept_order_by)}"
        for file in summary.files
        if file.kept_order
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
