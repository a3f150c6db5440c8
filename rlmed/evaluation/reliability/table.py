"""The reliability of a model as a terminal table."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from rlmed.core.calibration import Estimate
from rlmed.evaluation.records import Accuracy, p_value_text
from rlmed.evaluation.reliability.results import FileReliability, Gap, ReliabilitySummary


def reliability_table(summary: ReliabilitySummary) -> Table:
    """Build a table with a column per file and a line per figure, in per cent with its interval."""
    table = Table(
        title=Text(f"Reliability in %, {summary.model}"),
        caption="intervals: 95 %, Wilson for shares of questions, else bootstrap",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("", overflow="fold")
    for file in summary.files:
        table.add_column(f"{file.name}\n{file.rows} rows", justify="right", overflow="fold")
    columns = [_figures(file) for file in summary.files]
    labels = dict.fromkeys(label for figures in columns for label in figures)
    for label in labels:
        table.add_row(label, *(figures.get(label, "–") for figures in columns))
    for domain in summary.domains:
        names = ", ".join(domain.modalities)
        modalities = "trained modalities" if domain.trained else "other modalities"
        cell = f"{modalities}: {names}, {domain.real.rows} rows: accuracy {_cell(domain.real)}"
        table.caption = Text(f"{table.caption}\n{cell}")
    return table


def _figures(file: FileReliability) -> dict[str, str]:
    passes = {f"pass@{entry.k}": _cell(entry.share) for entry in file.sampling.passes}
    figures: dict[str, str] = {}
    for label, found in (("reasoned", file.reasoned), ("direct", file.direct)):
        if found is not None:
            figures |= {
                f"calibration error, {label}": _cell(found.error),
                f"confidence, {label}": _cell(found.confidence),
                f"accuracy, {label}": _cell(found.accuracy),
            }
    figures |= passes | {f"majority of {file.sampling.samples}": _cell(file.sampling.vote)}
    if file.order is not None:
        figures["same option in all orders"] = _cell(file.order.stays)
    if file.kept_order:
        figures["rows that keep their order"] = str(file.kept_order)
    whole = file.reliance[0]
    for label, gap in (("blank", whole.blank), ("shuffled", whole.shuffled)):
        if gap is not None:
            figures[f"lost over {label} pictures"] = _lost(gap)
    if file.agreement.agrees is not None:
        figures["answer as argued"] = _cell(file.agreement.agrees)
    return figures


def _cell(figure: Accuracy | Estimate) -> str:
    return f"{100 * figure.value:.1f} ({100 * figure.low:.0f}–{100 * figure.high:.0f})"


def _lost(gap: Gap) -> str:
    one = gap.difference
    return f"{100 * one.value:.1f} ({100 * one.low:.0f} to {100 * one.high:.0f}), p {p_value_text(gap.p_value)}"
