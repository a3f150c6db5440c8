"""Metrics of tensors that reduce correctly: over the micro-batches of a step here, over ranks by the caller.

A mean of micro-batch means is wrong as soon as micro-batches differ in size, so means travel as sum and count. Values
stay tensors on their device until `value()`, so that collecting them does not stall the accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MetricSum:
    """A mean, kept as sum and count; ranks reduce both by summing.

    Example:
        1 of 4 tokens clipped: MetricSum(total=tensor(1.), count=tensor(4.)).value() is 0.25.
    """

    total: Tensor
    """float []."""
    count: Tensor
    """float []."""

    def merge(self, other: MetricSum | MetricMax) -> MetricSum:
        """The mean over what both counted."""
        assert isinstance(other, MetricSum), "a mean and a maximum share a name"
        return MetricSum(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """The mean; NaN when nothing was counted."""
        count = float(self.count)
        return float(self.total) / count if count else math.nan


@dataclass(frozen=True)
class MetricMax:
    """A maximum; ranks reduce it by their maximum."""

    maximum: Tensor
    """float []."""

    def merge(self, other: MetricSum | MetricMax) -> MetricMax:
        """The larger of both; NaN if either is."""
        assert isinstance(other, MetricMax), "a mean and a maximum share a name"
        return MetricMax(torch.maximum(self.maximum, other.maximum))

    def value(self) -> float:
        """The maximum as a number."""
        return float(self.maximum)


LossMetrics = dict[str, MetricSum | MetricMax]


def mean_metric(values: Tensor) -> MetricSum:
    """The mean of `values` [N], without gradient."""
    total = values.detach().sum()
    return MetricSum(total, torch.full_like(total, values.numel()))


def merge_metrics(parts: Iterable[Mapping[str, MetricSum | MetricMax]]) -> LossMetrics:
    """Metrics of a step from those of its micro-batches."""
    merged: LossMetrics = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged
