"""The headline figures of a run: over which steps they are taken, wherever they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 10
"""Most steps in a headline figure."""


@dataclass(frozen=True, slots=True)
class Headline:
    """A metric at both ends of a run.

    Example:
        Headline(start=0.4, end=1.9, steps=10) of a run of 20 steps or more
    """

    start: float | None
    """Mean over its first `steps` steps; None for a run of one step."""
    end: float
    """Mean over its last `steps` steps."""
    steps: int
    """`WINDOW`, or half of a run of fewer than twice as many: the ends do not meet."""

    @property
    def note(self) -> str:
        """Which steps the figures are of, for the reader."""
        if self.start is None:
            return "at the only step"
        if self.steps == 1:
            return "at the first and the last step"
        return f"means of the first and the last {self.steps} steps"


def headline(metrics: Sequence[Mapping[str, Any]], name: str) -> Headline | None:
    """Return a metric at both ends of a run; None if no step has it.

    Args:
        metrics: lines of metrics.jsonl; a step without the metric, or with null, is left out.
        name: of the metric.
    """
    values = [line[name] for line in metrics if line.get(name) is not None]
    if not values:
        return None
    steps = max(1, min(WINDOW, len(values) // 2))
    start = float(np.mean(values[:steps])) if len(values) > 1 else None
    return Headline(start, float(np.mean(values[-steps:])), steps)
