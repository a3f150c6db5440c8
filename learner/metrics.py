"""Tensor metrics that reduce correctly: over a step's micro-batches here, over ranks by the caller.

A mean of micro-batch means is wrong as soon as micro-batches differ in size, so means are kept as
sum and count. Values stay tensors on their device until `value()`, so collecting them does not
stall the accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MetricSum:
    """A mean as sum and count; ranks sum both.

    Example:
        >>> one_of_four_clipped = MetricSum(total=torch.tensor(1.0), count=torch.tensor(4.0))
        >>> one_of_four_clipped.merge(mean_metric(torch.tensor([1.0]))).value()
        0.4
    """

    total: Tensor
    """float []."""
    count: Tensor
    """float []."""

    def merge(self, other: MetricSum | MetricMax) -> MetricSum:
        """Return the mean over both."""
        assert isinstance(other, MetricSum), "a mean and a maximum share a name"
        return MetricSum(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """Return the mean; NaN if nothing was counted."""
        count = float(self.count)
        return float(self.total) / count if count else math.nan


@dataclass(frozen=True)
class MetricMax:
    """A maximum; ranks take the largest."""

    maximum: Tensor
    """float []."""

    def merge(self, other: MetricSum | MetricMax) -> MetricMax:
        """Return the larger of both; NaN if either is."""
        assert isinstance(other, MetricMax), "a mean and a maximum share a name"
        return MetricMax(torch.maximum(self.maximum, other.maximum))

    def value(self) -> float:
        """Return the maximum as a number."""
        return float(self.maximum)


LossMetrics = dict[str, MetricSum | MetricMax]


def mean_metric(values: Tensor) -> MetricSum:
    """Return the mean of `values` [N] as a metric, without gradient."""
    total = values.detach().sum()
    return MetricSum(total, torch.full_like(total, values.numel()))


def merge_metrics(parts: Iterable[Mapping[str, MetricSum | MetricMax]]) -> LossMetrics:
    """Merge the metrics of a step's micro-batches."""
    merged: LossMetrics = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged
