"""Learning curves of two sides over several seeds.

Final rewards and a test of their difference, the time to a level that all reach, a picture.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy import stats

mpl.use("agg")
from matplotlib import pyplot as plt

SMOOTHED = 5
"""Steps of a moving average."""
ROUNDING = 1e-9
"""More than sums of rewards round by."""
LAST = 10
"""Steps whose mean reward is a run's final one."""
COLOURS = {"rlmed": "#1b6ca8", "trl": "#d1732b"}
NAMES = {"rlmed": "rlmed", "trl": "TRL"}


def smooth(values: Sequence[float]) -> np.ndarray:
    """Mean of each value and up to `SMOOTHED` - 1 before it.

    Example:
        >>> smooth([1.0, 3.0, 2.0]).tolist()
        [1.0, 2.0, 2.0]
    """
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - SMOOTHED)
    return (sums[ends] - sums[starts]) / (ends - starts)


def welch(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Difference of two means, its 95 % interval and p-value by Welch's t-test.

    Example:
        >>> found = welch([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
        >>> found["difference"], round(found["p"], 3)
        (-1.0, 0.288)
    """
    tested = stats.ttest_ind(first, second, equal_var=False)
    low, high = tested.confidence_interval()
    return {
        "difference": statistics.fmean(first) - statistics.fmean(second),
        "low": float(low),
        "high": float(high),
        "p": float(tested.pvalue),
    }


def reached(steps: Sequence[Mapping[str, float]], level: float) -> int | None:
    """The first step, from 1, whose smoothed reward is at `level` or above; None without one.

    Counts from the `SMOOTHED`th step on: before it, there is no average of as many.
    """
    rewards = smooth([step["reward"] for step in steps])
    return next((at + 1 for at in range(SMOOTHED - 1, len(rewards)) if rewards[at] >= level - ROUNDING), None)


def common_level(runs: Sequence[Sequence[Mapping[str, float]]]) -> float:
    """The highest smoothed reward, in steps of 0.05, that every run reaches."""
    highest = [smooth([step["reward"] for step in steps])[SMOOTHED - 1 :].max() for steps in runs]
    return round(math.floor(min(highest) / 0.05 + ROUNDING) * 0.05, 2)


def compare(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of both sides, and whether their final and mean rewards differ."""
    sides = {name: [result["steps"][name] for result in results] for name in NAMES}
    level = common_level([steps for runs in sides.values() for steps in runs])
    found: dict[str, Any] = {"level": level}
    for name, runs in sides.items():
        ends = [reached(steps, level) for steps in runs]
        spent = {
            key: [round(sum(step[key] for step in steps[:end]), 1) for steps, end in zip(runs, ends, strict=True)]
            for key in ("seconds", "cpu_seconds")
        }
        found[name] = {
            "final": [statistics.fmean(step["reward"] for step in steps[-LAST:]) for steps in runs],
            "mean": [statistics.fmean(step["reward"] for step in steps) for steps in runs],
            "test_accuracy": [result["test"][name]["accuracy"] for result in results],
            "to_level": {"steps": ends, **spent},
            "step_seconds": statistics.median(step["seconds"] for steps in runs for step in steps),
            "step_cpu_seconds": statistics.median(step["cpu_seconds"] for steps in runs for step in steps),
        }
    if len(results) > 1:
        found["difference"] = welch(found["rlmed"]["final"], found["trl"]["final"])
        found["difference_of_means"] = welch(found["rlmed"]["mean"], found["trl"]["mean"])
    for key in ("seconds", "cpu_seconds"):
        spent = {name: sum(found[name]["to_level"][key]) for name in NAMES}
        found[f"ratio_of_{key}_to_level"] = round(spent["trl"] / spent["rlmed"], 2)
        found[f"ratio_of_step_{key}"] = round(found["trl"][f"step_{key}"] / found["rlmed"][f"step_{key}"], 2)
    return found


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Reward by step and by time: mean and standard deviation over the seeds, each seed faintly."""
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for name, label in NAMES.items():
        curves = np.array([smooth([step["reward"] for step in result["steps"][name]]) for result in results])
        times = np.array([np.cumsum([step["seconds"] for step in result["steps"][name]]) for result in results]) / 60
        steps, mean = np.arange(1, curves.shape[1] + 1), curves.mean(axis=0)
        noise = curves.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
        by_step.fill_between(steps, mean - noise, mean + noise, color=COLOURS[name], alpha=0.18, linewidth=0)
        by_step.plot(steps, mean, color=COLOURS[name], linewidth=2, label=label)
        for minutes, curve in zip(times, curves, strict=True):
            by_time.plot(minutes, curve, color=COLOURS[name], linewidth=0.8, alpha=0.6)
        by_time.plot(times.mean(axis=0), mean, color=COLOURS[name], linewidth=2, label=label)
    by_step.set(xlabel="step", ylabel=f"reward (mean of {SMOOTHED} steps)")
    by_time.set(xlabel="minutes on one core")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_step.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
