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

MEANING = {
    "visual_reliance": "score on the own picture minus that on another question's",
    "blank_reliance": "score on the own picture minus that on a grey one",
    "lost": "of the right answers, those that are wrong over a grey picture",
    "image_sensitivity": "answers that change with another question's picture",
    "blank_sensitivity": "answers that change over a grey picture",
    "visual_claims": "completions whose reasoning presents something as seen",
    "hallucinated_reasoning": "of all completions, those that also answer the same on another question's picture",
    "blank_claims": "completions over a grey picture that present something as seen",
    "blank_answers": "answers over a grey picture that assert a finding, where the question allows another",
}
"""What each figure is, in a line."""


def faithfulness_table(found: Sequence[Faithfulness]) -> Table | None:
    """Build a table with a column per file and task, two lines per figure, in per cent."""
    if not found:
        return None
    table = Table(
        title=Text("Faithfulness to the picture in %"),
        caption=Text(
            "after arXiv 2603.03437; what is ours: docs/reliability.md\n"
            "small figures: 95 % intervals, paired for reliance and loss of score, else Wilson's\n"
            "n: rows that a figure is about, where not all",
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
            table.add_row(label, *(_cell(figure, one.rows) for figure, one in zip(figures, found, strict=True)))
    return table


def _cell(figure: Accuracy | Estimate | None, rows: int) -> str:
    if figure is None:
        return "–"
    value, low, high = (100 * x + 0.0 for x in (figure.value, figure.low, figure.high))
    cell = f"{value:.1f}\n{low:.0f} to {high:.0f}"
    return cell if figure.rows == rows else f"{cell}\nn={figure.rows}"
