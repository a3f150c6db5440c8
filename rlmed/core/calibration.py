"""Calibration error, pass@k and bootstrap intervals, in pure numpy.

Only the bootstrap and `calibrated_error_bound` draw random numbers, both from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt

from rlmed.core.statistics import BoolArray, wilson_interval
from rlmed.core.types import IntArray

Float64Array = npt.NDArray[np.float64]

BINS = 15
"""Bins of equal width for the calibration error (Guo et al. 2017, arXiv 1706.04599)."""
RESAMPLES = 1000
_NUMBERS = 2**21
"""Numbers drawn at once for a mean's interval, 16 MiB; the figures do not depend on it."""
_ROUNDING = 1e-12
"""Values that differ by less are equal: means of the same scores, summed in other orders."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic with its 95 % interval over questions: by bootstrap, unless said otherwise.

    Example:
        Estimate(value=0.082, low=0.061, high=0.131, rows=300)
    """

    value: float
    low: float
    high: float
    rows: int
    """Number of questions that it was computed from."""

    @classmethod
    def of(cls, statistic: Callable[[IntArray], float], rows: int) -> Estimate:
        """Return the statistic of all rows with its interval (see `bootstrap_interval`)."""
        low, high = bootstrap_interval(statistic, rows)
        return cls(statistic(np.arange(rows, dtype=np.int64)), low, high, rows)

    @classmethod
    def mean(cls, values: npt.ArrayLike, bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
        """Return the mean of one number per question, float [N], with its `mean_interval`."""
        array = np.asarray(values, dtype=np.float64)
        low, high = mean_interval(array, bounds)
        return cls(float(array.mean()), low, high, len(array))

    @classmethod
    def ratio(cls, counts: npt.ArrayLike, totals: npt.ArrayLike) -> Estimate:
        """Return sum(counts) / sum(totals), float [N] each, for questions with several answers.

        A resample without any total counts as 0. A share that no resample changes has the interval
        of equal values (see `equal_interval`).
        """
        above, below = (np.asarray(values, dtype=np.float64) for values in (counts, totals))
        found = cls.of(lambda rows: float(above[rows].sum() / max(below[rows].sum(), 1)), len(above))
        if found.high - found.low > _ROUNDING:
            return found
        return cls(found.value, *equal_interval(found.value, found.rows), found.rows)


def mean_interval(values: npt.ArrayLike, bounds: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """Return the 95 % interval of a mean of bounded numbers.

    Numbers that are all at a bound, as whether an answer is right, have Wilson's interval; equal
    ones `equal_interval`; others the percentile bootstrap (see `bootstrap_interval`).

    Example:
        >>> [round(bound, 3) for bound in mean_interval([0, 0, 0, 0, 0])]
        [0.0, 0.434]
        >>> [round(bound, 3) for bound in mean_interval([0.5, 0.5, 0.5, 0.5, 0.5])]
        [0.283, 0.717]

    Args:
        values: float [N].
        bounds: the least and the greatest number possible.

    Raises:
        ValueError: without values, or if one is out of bounds.
    """
    array = np.asarray(values, dtype=np.float64)
    lowest, highest = bounds
    if not len(array):
        raise ValueError("a mean of no values has no interval: give at least one")
    if not np.all((array >= lowest - _ROUNDING) & (array <= highest + _ROUNDING)):
        raise ValueError(f"values run from {array.min()} to {array.max()}: they must lie in [{lowest}, {highest}]")
    if np.ptp(array) <= _ROUNDING:
        return equal_interval(float(array[0]), len(array), bounds)
    if np.all((array == lowest) | (array == highest)):
        low, high = wilson_interval(int((array == highest).sum()), len(array))
        return lowest + (highest - lowest) * low, lowest + (highest - lowest) * high
    random, some = np.random.default_rng(0), max(1, _NUMBERS // len(array))
    sizes = [min(some, RESAMPLES - at) for at in range(0, RESAMPLES, some)]
    means = [array[random.integers(0, len(array), (size, len(array)))].mean(1) for size in sizes]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def equal_interval(value: float, rows: int, bounds: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """Return the 95 % interval of a mean of equal values, which a bootstrap gives no width.

    Of N rows none differs, so the share of other values is at most u, the upper bound of Wilson's
    interval (1927) for 0 of N, near the rule of three, 3 / N (Hanley and Lippman-Hand 1983). Those
    could lie anywhere within the bounds: [v - u (v - lowest), v + u (highest - v)]. At a bound this
    is Wilson's interval.

    Args:
        value: what all rows have.
        rows: their number.
        bounds: the least and the greatest number possible.
    """
    lowest, highest = bounds
    _, others = wilson_interval(0, rows)
    return value - others * (value - lowest), value + others * (highest - value)


def bootstrap_interval(
    statistic: Callable[[IntArray], float],
    rows: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval (Efron 1979): quantiles over resampled rows.

    Args:
        statistic: maps row indices, int64 [rows], drawn with replacement, to a number.
        rows: number of rows.
        resamples: number of resamples.
        seed: seed of the draws.

    Raises:
        ValueError: if `rows` is less than 1.
    """
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1 for a bootstrap interval")
    drawn = np.random.default_rng(seed).integers(0, rows, (resamples, rows))
    values = [statistic(indices) for indices in drawn]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The questions whose confidence lies in (low, high]; the first bin holds 0 too.

    Example:
        ReliabilityBin(low=0.8, high=0.867, count=24, correct=15, confidence=0.841)
    """

    low: float
    high: float
    count: int
    correct: int
    confidence: float
    """Mean of the questions' confidences."""


def calibration_error(confidence: Float64Array, correct: BoolArray, bins: int = BINS) -> float:
    """Return the calibration error: |accuracy - confidence| of bins, mean by row (Guo et al. 2017).

    Args:
        confidence: float [N], probability of the chosen answer.
        correct: bool [N], whether it was correct.
        bins: number of bins of equal width.

    Raises:
        ValueError: for no rows, unequal lengths, or confidences outside [0, 1].
    """
    _check(confidence, correct)
    gap = np.bincount(_bin_of(confidence, bins), weights=confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(correct))


def calibrated_error_bound(confidence: Float64Array, *, resamples: int = RESAMPLES) -> float:
    """Return the error that a calibrated model with these confidences exceeds in 1 data set of 20.

    With few rows in a bin, even a calibrated model has a positive error; this bound shows how large
    that effect is. Each answer is drawn correct with its confidence (consistency resampling,
    Bröcker and Smith 2007).
    """
    draws = np.random.default_rng(0).random((resamples, len(confidence))) < confidence
    return float(np.percentile([calibration_error(confidence, correct) for correct in draws], 95))


def reliability_bins(confidence: Float64Array, correct: BoolArray, bins: int = BINS) -> tuple[ReliabilityBin, ...]:
    """Return the non-empty bins, low to high; arguments and errors as in `calibration_error`."""
    _check(confidence, correct)
    index, edges = _bin_of(confidence, bins), np.linspace(0, 1, bins + 1)
    found = []
    for i in np.unique(index):
        inside = index == i
        hits, mean = int(correct[inside].sum()), float(confidence[inside].mean())
        found.append(ReliabilityBin(float(edges[i]), float(edges[i + 1]), int(inside.sum()), hits, mean))
    return tuple(found)


def brier_score(probabilities: Float64Array, answer: int) -> float:
    """Return the Brier score (1950) of one question, in [0, 2]; `probabilities` is float [K]."""
    truth = np.zeros(len(probabilities))
    truth[answer] = 1
    return float(np.square(probabilities - truth).sum())


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return unbiased pass@k, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374).

    Example:
        >>> pass_at_k(8, 2, 4)
        0.7857142857142857

    Raises:
        ValueError: unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(
            f"pass@{k} is undefined for {correct} correct of {samples}: k must lie between 1 and the number of samples"
        )
    return 1 - comb(samples - correct, k) / comb(samples, k)


def _bin_of(confidence: Float64Array, bins: int) -> npt.NDArray[np.intp]:
    return np.maximum(np.digitize(confidence, np.linspace(0, 1, bins + 1), right=True) - 1, 0)


def _check(confidence: Float64Array, correct: BoolArray) -> None:
    if confidence.shape != correct.shape or confidence.ndim != 1 or not len(correct):
        raise ValueError(
            f"confidences of shape {confidence.shape} and answers of shape {correct.shape} must be flat, non-empty and of "
            "equal length"
        )
    if not np.all((confidence >= 0) & (confidence <= 1)):
        raise ValueError(f"confidences run from {confidence.min()} to {confidence.max()}: they must lie in [0, 1]")
