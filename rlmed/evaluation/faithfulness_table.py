"""Faithfulness to the picture as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from rlmed.core.calibration import Estimate
from rlmed.evaluation.faithfulness import Faithfulness
from rlmed.evaluation.records import Accuracy

SHOWN = {
    "visual_reliance": "visual reliance",
    "blank_reliance": "score lost over grey",
    "lost": "right answers lost over grey",
    "image_sensitivity": "image sensitivity",
    "blank_sensitivity": "answers changed by grey",
    "visual_claims": "visual claims",
    "hallucinated_reasoning": "hallucinated reasoning",
    "blank_claims": "visual claims over grey",
    "blank_answers": "findings asserted over grey",
}
"""What each figure is called in the table."""


def faithfulness_table(found: Sequence[Faithfulness]) -> Table | None:
    """Build a table with a column per file and task, two lines per figure, in per cent."""
    if not found:
        return None
    table = Table(
        title=Text("Faithfulness to the picture in %"),
        caption=Text(
            "after arXiv 2603.03437; what is ours: docs/reliability.md\n"
            "small figures: 95 % intervals, paired bootstrap for reliance and loss of score, else Wilson",
            justify="left",
        ),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("", overflow="fold")
    for one in found:
        table.add_column(f"{one.file}\n{one.task}\n{one.rows} rows", justify="right", overflow="fold")
    for name, label in SHOWN.items():
        figures = [getattr(one, name) for one in found]
        if any(figure is not None for figure in figures):
            table.add_row(label, *map(_cell, figures))
    return table


def _cell(figure: Accuracy | Estimate | None) -> str:
    if figure is None:
        return "–"
    value, low, high = (100 * x + 0.0 for x in (figure.value, figure.low, figure.high))
    return f"{value:.1f}\n{low:.0f} to {high:.0f}"
