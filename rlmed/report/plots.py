"""Draw the report's curves as inline SVG; CSS variables make colours follow light and dark mode."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlmed.evaluation.results import EvalSummary

MAX_POINTS = 400
"""Longer curves are averaged down to this many points, more than the pixels of a curve."""
SMOOTHED_FROM = 20
"""Curves with at least this many steps get a running mean."""

# Placeholders for CSS variables: matplotlib needs real colours, and these occur nowhere else.
TEXT, FAINT = "#010203", "#010204"
SERIES = tuple(f"#01030{digit}" for digit in range(1, 7))
VARIABLES = {TEXT: "--muted", FAINT: "--line"} | {colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keep text as text: smaller, and in the page's font
    "svg.hashsalt": "rlmed",  # deterministic output
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # show metric names literally
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: the metrics to draw and their labels."""

    title: str
    note: str
    metrics: Mapping[str, str]
    """Name in metrics.jsonl to label in the legend."""
    share: bool = False
    """True for fractions: the axis runs from 0 to 1."""


PANELS = (
    Panel("KL to the reference", "how far the policy has moved", {"kl": "kl"}),
    Panel("Entropy", "per token, in nats; near zero, the policy has stopped exploring", {"entropy": "entropy"}),
    Panel("Completion length", "mean, in tokens", {"completion/length": "length"}),
    Panel("Loss", "", {"loss": "loss"}),
    Panel(
        "Target tokens above one half",
        "share of target tokens with probability > 0.5",
        {"tokens_above_half": "share"},
        True,
    ),
    Panel("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    Panel("Rollout against learner", "KL between engine and learner; 0 if they agree", {"mismatch_kl": "mismatch"}),
    Panel(
        "Shares",
        "completions cut by length; groups with zero reward variance",
        {"completion/truncated": "cut", "groups/zero_variance": "zero variance"},
        True,
    ),
    Panel(
        "Prompts set aside",
        "share of the training rows currently skipped for their pass rate",
        {"prompts/too_easy": "too easy", "prompts/too_hard": "too hard"},
        True,
    ),
    Panel("Clipped ratios", "share of tokens", {"clip_fraction_low": "low", "clip_fraction_high": "high"}),
    Panel("Staleness", "policy versions behind, oldest group of a step", {"staleness": "staleness"}),
    Panel("Idle rollout workers", "share of time without work", {"rollout/idle_share": "idle"}, True),
    Panel(
        "Lost rollout workers",
        "counts since the start; their groups are sampled again",
        {"rollout/workers_lost": "workers", "rollout/groups_sampled_again": "groups sampled again"},
    ),
    Panel("Learning rate", "", {"lr": "lr"}),
    Panel("Tokens per second", "sampled", {"tokens_per_second": "tokens/s"}),
)


@dataclass(frozen=True, slots=True)
class Readout:
    """What a reader who points at a plot is told: its curves, and where on the plot a step is."""

    span: tuple[float, float]
    """First and last step of the axis."""
    place: tuple[float, float]
    """Where these are, as fractions of the plot's width."""
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """Steps and values, to four digits, by label."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawn panel."""

    title: str
    note: str
    svg: Markup
    readout: Readout | None = None


def _current_name(name: str) -> str:
    """Translate a metric name of rlmed 0.1."""
    return "groups/zero_variance" if name == "groups/no_spread" else re.sub("^spread/", "reward_std/", name)


def draw_metrics(lines: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Draw the curves with finite values, rewards first.

    Args:
        lines: lines of metrics.jsonl: "step", and values by name; null means missing.
    """
    lines = _with_current_names(lines)
    panels = _panels(lines)
    plots = []
    for panel in panels:
        curves = {label: _values(lines, metric) for metric, label in panel.metrics.items()}
        curves = {label: (steps, values) for label, (steps, values) in curves.items() if len(steps)}
        # an all-zero curve (no clipping, no staleness) is uninformative
        if any(np.any(values) for _, values in curves.values()):
            plots.append(Plot(panel.title, panel.note, *_draw(curves, panel)))
    return plots


def _with_current_names(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{_current_name(name): value for name, value in line.items()} for line in lines]


def _panels(lines: Sequence[Mapping[str, Any]]) -> tuple[Panel, ...]:
    """Return the panels of a run: those of its own rewards, and `PANELS`."""
    named = {name for line in lines for name in line if name.startswith("reward/") and not name.endswith("_missing")}
    rewards = sorted(named - {"reward/mean"})
    names = {"reward/mean": "total", **{name: name.removeprefix("reward/") for name in rewards}}
    deviations = sorted({name for line in lines for name in line if name.startswith("reward_std/")})
    return (
        Panel("Reward", "mean over a step's completions: weighted sum and parts", names),
        *PANELS,
        Panel(
            "Standard deviation of rewards",
            "within a group, running; divides the advantages",
            {name: name.removeprefix("reward_std/") for name in deviations},
        ),
    )


def draw_comparison(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Plot]:
    """Draw one plot a metric with a curve a run, of metrics that at least one run has.

    Args:
        runs: lines of metrics.jsonl by the run's label.
    """
    current = {label: _with_current_names(lines) for label, lines in runs.items()}
    plots = []
    for panel in _panels([line for lines in current.values() for line in lines]):
        for metric, part in panel.metrics.items():
            curves = {label: _values(lines, metric) for label, lines in current.items()}
            curves = {label: values for label, values in curves.items() if len(values[0])}
            if any(np.any(values) for _, values in curves.values()):
                title = panel.title if len(panel.metrics) == 1 else f"{panel.title}: {part}"
                plots.append(Plot(title, panel.note, *_draw(curves, panel, colours=list(runs))))
    return plots


def draw_values(title: str, note: str, points: Sequence[tuple[int, float]]) -> Plot:
    """Draw values by step, each with a mark."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        axes.plot(*zip(*points, strict=True), color=SERIES[0], lw=1.2, marker="o", markersize=3.5)
        return Plot(title, note, to_svg(figure))


def draw_accuracy(summaries: Sequence[EvalSummary]) -> Plot | None:
    """Draw each file's accuracy over evaluations, with intervals; None for fewer than two."""
    if len(summaries) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        names = dict.fromkeys(file.name for summary in summaries for file in summary.files)
        curves = {}
        for colour, name in zip(itertools.cycle(SERIES), names, strict=False):
            points = [(s.step, f.accuracy) for s in summaries for f in s.files if f.name == name]
            steps = [step for step, _ in points]
            curves[name] = np.array(steps, dtype=np.float64), np.array([one.value for _, one in points])
            axes.plot(
                steps, [one.value for _, one in points], color=colour, label=_shown(name), marker="o", markersize=3.5
            )
            bands = [one.low for _, one in points], [one.high for _, one in points]
            axes.fill_between(steps, *bands, color=colour, alpha=0.12, lw=0)
        axes.set_ylim(0, 1)
        _legend(figure)
        svg = to_svg(figure)
        return Plot("Held-out accuracy", "greedy; bands: Wilson 95 %", svg, _readout(axes, curves))


def _legend(figure: Figure) -> None:
    """Put the legend above the axes, where it covers no curve."""
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside upper left", borderaxespad=0)


def _shown(name: str) -> str:
    """Return a label that the legend shows: matplotlib skips labels with a leading underscore."""
    return f" {name}" if name.startswith("_") else name


def _values(lines: Sequence[Mapping[str, Any]], metric: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
    steps, values = (
        np.array(column, dtype=np.float64) for column in (zip(*points, strict=True) if points else ([], []))
    )
    if len(steps) > MAX_POINTS:
        parts = [np.array_split(column, MAX_POINTS) for column in (steps, values)]
        steps, values = (np.array([part.mean() for part in column]) for column in parts)
    return steps, values


def _draw(
    curves: Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]],
    panel: Panel,
    colours: Sequence[str] | None = None,
) -> tuple[Markup, Readout]:
    """Draw curves by label; `colours` lists all labels in the order of their colours."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        for i, (name, (steps, values)) in enumerate(curves.items()):
            label = _shown(name)
            colour = SERIES[(i if colours is None else colours.index(name)) % len(SERIES)]
            if len(steps) < SMOOTHED_FROM:
                axes.plot(steps, values, color=colour, lw=1.6, label=label, marker="o" if len(steps) == 1 else "")
            else:
                axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
                axes.plot(steps, running_mean(values, len(values) // 20 + 1), color=colour, lw=1.8, label=label)
        if panel.share:
            axes.set_ylim(-0.02, 1.02)
        if len(curves) > 1 and colours is None:
            _legend(figure)
        svg = to_svg(figure)
        return svg, _readout(axes, curves)


def _readout(axes: Axes, curves: Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]) -> Readout:
    """Describe axes that have been drawn: their place is settled only then."""
    first, last = axes.get_xlim()
    place = axes.get_position()
    return Readout(
        (round(first, 4), round(last, 4)),
        (round(place.x0, 4), round(place.x1, 4)),
        {
            label: [(float(f"{step:.8g}"), float(f"{value:.4g}")) for step, value in zip(steps, values, strict=True)]
            for label, (steps, values) in curves.items()
        },
    )


def running_mean(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Return the centred mean over `window` values, fewer at the ends; same shape [N]."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def new_figure(x_label: str = "step") -> tuple[Figure, Axes]:
    """Create empty axes in the report's style; call inside `mpl.rc_context(STYLE)`."""
    figure = Figure(figsize=(4.2, 2.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, fontsize=8)
    axes.grid(axis="y", lw=0.6)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    return figure, axes


def to_svg(figure: Figure) -> Markup:
    """Render a figure as an SVG element without metadata, namespaces, fixed colours or fonts."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->| xmlns(:xlink)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)  # trusted: matplotlib escapes the text in it
