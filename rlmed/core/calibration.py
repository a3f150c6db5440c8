"""Does a probability mean what it says, how often does one of k answers hit, and how sure is a figure: pure numpy.

Nothing here draws random numbers but the bootstrap and `calibrated_error_bound`, both from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt

from rlmed.core.statistics import BoolArray
from rlmed.core.types import IntArray

Float64Array = npt.NDArray[np.float64]

BINS = 15
"""Bins of equal width for the calibration error (Guo et al. 2017, arXiv 1706.04599)."""
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure that is no plain share, with its bootstrap 95 % interval over questions.

    Example:
        Estimate(value=0.082, low=0.061, high=0.131, rows=300)
    """

    value: float
    low: float
    high: float
    rows: int
    """Questions that it was computed from."""

    @classmethod
    def of(cls, statistic: Callable[[IntArray], float], rows: int, *, seed: int = 0) -> Estimate:
        """The statistic of all rows, and the interval of `bootstrap_interval`, which see."""
        low, high = bootstrap_interval(statistic, rows, seed=seed)
        return cls(statistic(np.arange(rows, dtype=np.int64)), low, high, rows)

    @classmethod
    def mean(cls, values: npt.ArrayLike, *, seed: int = 0) -> Estimate:
        """The mean of one number a question, float [N]."""
        array = np.asarray(values, dtype=np.float64)
        return cls.of(lambda rows: float(array[rows].mean()), len(array), seed=seed)

    @classmethod
    def ratio(cls, counts: npt.ArrayLike, totals: npt.ArrayLike, *, seed: int = 0) -> Estimate:
        """Sum of the counts over the sum of the totals, float [N] each, where a question gives several answers.

        A resample without any total counts as 0.
        """
        above, below = (np.asarray(values, dtype=np.float64) for values in (counts, totals))
        return cls.of(lambda rows: float(above[rows].sum() / max(below[rows].sum(), 1)), len(above), seed=seed)


def bootstrap_interval(
    statistic: Callable[[IntArray], float],
    rows: int,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap (Efron 1979): the statistic's quantiles over resampled rows.

    Args:
        statistic: of the rows with these indices, int64 [rows], with repetitions.
        rows: how many there are.
        level: share of the resamples inside.
        resamples: how often rows are drawn.
        seed: of the draws.

    Raises:
        ValueError: without rows.
    """
    if rows < 1:
        raise ValueError("no interval without rows: a bootstrap draws from at least one")
    drawn = np.random.default_rng(seed).integers(0, rows, (resamples, rows))
    values = [statistic(indices) for indices in drawn]
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The questions whose confidence lies in (low, high]; the first bin holds 0 too.

    Example:
        ReliabilityBin(low=0.8, high=0.867, count=24, right=15, confidence=0.841)
    """

    low: float
    high: float
    count: int
    right: int
    confidence: float
    """Mean of the questions' confidences."""


def calibration_error(confidence: Float64Array, right: BoolArray, bins: int = BINS) -> float:
    """Expected calibration error: the mean over questions of |accuracy - confidence| of their bin (Guo et al. 2017).

    Args:
        confidence: float [N], probability of the answer that was chosen.
        right: bool [N], whether it was right.
        bins: number of bins of equal width.

    Raises:
        ValueError: for no rows, other lengths, or confidences outside [0, 1].
    """
    _check(confidence, right)
    gap = np.bincount(_bin_of(confidence, bins), weights=confidence - right, minlength=bins)
    return float(np.abs(gap).sum() / len(right))


def calibrated_error_bound(
    confidence: Float64Array, bins: int = BINS, *, resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """The calibration error that a calibrated model of these confidences exceeds in one data set of 20.

    Few rows in a bin make the error of any model positive; this says how much of it that is: each answer is drawn to be
    right with its confidence (consistency resampling, Bröcker and Smith 2007).
    """
    draws = np.random.default_rng(seed).random((resamples, len(confidence))) < confidence
    return float(np.percentile([calibration_error(confidence, right, bins) for right in draws], 95))


def reliability_bins(confidence: Float64Array, right: BoolArray, bins: int = BINS) -> tuple[ReliabilityBin, ...]:
    """The bins that hold a question, from low to high; arguments and errors as in `calibration_error`."""
    _check(confidence, right)
    index, edges = _bin_of(confidence, bins), np.linspace(0, 1, bins + 1)
    found = []
    for i in np.unique(index):
        inside = index == i
        hits, mean = int(right[inside].sum()), float(confidence[inside].mean())
        found.append(ReliabilityBin(float(edges[i]), float(edges[i + 1]), int(inside.sum()), hits, mean))
    return tuple(found)


def brier_score(probabilities: Float64Array, answer: int) -> float:
    """Squared distance of one question's probabilities (float [K]) from certainty of its answer (Brier 1950), in [0, 2]."""
    truth = np.zeros(len(probabilities))
    truth[answer] = 1
    return float(np.square(probabilities - truth).sum())


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of k of the samples is right: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374).

    Example:
        >>> pass_at_k(8, 2, 4)
        0.7857142857142857

    Raises:
        ValueError: unless 1 <= k <= samples and 0 <= right <= samples.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(
            f"no pass@{k} of {right} right among {samples}: k must lie between 1 and the number of samples"
        )
    return 1 - comb(samples - right, k) / comb(samples, k)


def _bin_of(confidence: Float64Array, bins: int) -> npt.NDArray[np.intp]:
    return np.maximum(np.digitize(confidence, np.linspace(0, 1, bins + 1), right=True) - 1, 0)


def _check(confidence: Float64Array, right: BoolArray) -> None:
    if confidence.shape != right.shape or confidence.ndim != 1 or not len(right):
        raise ValueError(
            f"calibration pairs rows: confidences of shape {confidence.shape} and answers of shape {right.shape} do not pair"
        )
    if not np.all((confidence >= 0) & (confidence <= 1)):
        raise ValueError(f"confidences run from {confidence.min()} to {confidence.max()}: they must lie in [0, 1]")
