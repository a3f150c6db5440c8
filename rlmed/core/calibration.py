"""Calibration error, pass@k and bootstrap intervals, in pure numpy.

Only the bootstrap and `calibrated_error_bound` draw random numbers, both from a fixed seed.
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
    """A statistic with its bootstrap 95 % interval over questions.

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
    def mean(cls, values: npt.ArrayLike) -> Estimate:
        """Return the mean of one number per question, float [N]."""
        array = np.asarray(values, dtype=np.float64)
        return cls.of(lambda rows: float(array[rows].mean()), len(array))

    @classmethod
    def ratio(cls, counts: npt.ArrayLike, totals: npt.ArrayLike) -> Estimate:
        """Return sum(counts) / sum(totals), float [N] each, for questions with several answers.

        A resample without any total counts as 0.
        """
        above, below = (np.asarray(values, dtype=np.float64) for values in (counts, totals))
        return cls.of(lambda rows: float(above[rows].sum() / max(below[rows].sum(), 1)), len(above))


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
