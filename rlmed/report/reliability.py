"""Reliability section of the report: plots and template data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from rlmed.core.calibration import Estimate
from rlmed.evaluation.records import Accuracy
from rlmed.evaluation.reliability.results import (
    Calibration,
    FileReliability,
    OrderSensitivity,
    ReliabilitySummary,
    Sampling,
)
from rlmed.report.plots import FAINT, SERIES, STYLE, TEXT, Plot, new_figure, to_svg


def show_reliability(summary: ReliabilitySummary) -> dict[str, Any]:
    """Return the template's data: figures by file, plots, reliance by question type, domains."""
    return {
        "files": summary.files,
        "domains": summary.domains,
        "ks": sorted({entry.k for file in summary.files for entry in file.sampling.passes}),
        "samples": summary.files[0].sampling.samples,
        "orders": max((len(file.order.orders) for file in summary.files if file.order is not None), default=1),
        "plots": [plot for file in summary.files for plot in _plots(file)],
    }


def _plots(file: FileReliability) -> list[Plot]:
    plots = []
    for label, found in (("after reasoning", file.reasoned), ("without reasoning", file.direct)):
        if found is not None:
            plots.append(
                Plot(
                    f"{file.name}: reliability {label}",
                    f"{found.accuracy.rows} questions; accuracy by bin, Wilson 95 %, with the number of questions on top",
                    _draw_reliability(found),
                )
            )
    plots.append(
        Plot(
            f"{file.name}: pass@k",
            "at least one of k samples is right; dotted: majority vote; intervals: 95 %",
            _draw_sampling(file.sampling),
        )
    )
    if file.order is not None:
        plots.append(
            Plot(
                f"{file.name}: letters over {len(file.order.orders)} option orders",
                "share of answers with the letter, with 95 % intervals; bar: share of questions where it is right",
                _draw_letters(file.order),
            )
        )
    return plots


def _draw_reliability(found: Calibration) -> Any:
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("probability of the most likely option")
        axes.plot([0, 1], [0, 1], color=TEXT, lw=0.8, ls=":")
        shares = [Accuracy.of(entry.correct, entry.count) for entry in found.bins]
        x = [entry.confidence for entry in found.bins]
        _points(axes, x, shares, fmt="o", markersize=3.5, elinewidth=1)
        for confidence, entry in zip(x, found.bins, strict=True):
            axes.annotate(
                f"{entry.count}", (confidence, 1.09), ha="center", va="center", fontsize=7, annotation_clip=False
            )
        axes.set_xlim(0, 1.03)
        axes.set_ylim(-0.03, 1.14)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.set_ylabel("accuracy", fontsize=8)
        return to_svg(figure)


def _draw_sampling(found: Sampling) -> Any:
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("k")
        x = np.arange(len(found.passes))
        shares = [entry.share for entry in found.passes]
        axes.axhspan(found.vote.low, found.vote.high, color=FAINT, alpha=0.4, lw=0)
        axes.axhline(found.vote.value, color=TEXT, lw=1, ls=":")
        _points(axes, x, shares, marker="o", markersize=3.5, lw=1.6, elinewidth=1)
        axes.set_xticks(x, [str(entry.k) for entry in found.passes])
        axes.set_ylim(-0.02, 1.04)
        return to_svg(figure)


def _draw_letters(found: OrderSensitivity) -> Any:
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("letter")
        x = np.arange(len(found.letters))
        shares = [entry.chosen for entry in found.letters]
        axes.bar(x, [entry.correct for entry in found.letters], width=0.62, color=FAINT, lw=0)
        _points(axes, x, shares, color=SERIES[1], fmt="o", markersize=4, elinewidth=1.4)
        axes.set_xticks(x, [entry.letter for entry in found.letters])
        axes.set_ylim(0, max(0.5, *(one.high for one in shares)) * 1.05)
        return to_svg(figure)


def _points(axes: Axes, x: Any, figures: Sequence[Accuracy] | Sequence[Estimate], **style: Any) -> None:
    """Plot figures with intervals; a bootstrap interval may lie to one side of its value."""
    reach = [[max(0, one.value - one.low), max(0, one.high - one.value)] for one in figures]
    axes.errorbar(x, [one.value for one in figures], np.array(reach).T, **{"color": SERIES[0], **style})
