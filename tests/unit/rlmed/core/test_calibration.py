"""Calibration and pass@k against slow direct computations, the bootstrap against scipy."""

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
import scipy.stats

from rlmed.core.calibration import (
    Estimate,
    bootstrap_interval,
    brier_score,
    calibrated_error_bound,
    calibration_error,
    equal_interval,
    mean_interval,
    pass_at_k,
    reliability_bins,
)
from rlmed.core.statistics import wilson_interval


def draw(seed, n=200):
    """Confidences, some on the very edges of bins, and whether the answers were correct."""
    rng = np.random.default_rng(seed)
    confidence = np.concatenate([rng.random(n), np.linspace(0, 1, 16)])
    return confidence, rng.random(len(confidence)) < 0.6


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_equals_the_definition_bin_by_bin(seed, bins):
    confidence, correct = draw(seed)
    edges, expected, counts = np.linspace(0, 1, bins + 1), 0.0, []
    for i in range(bins):
        inside = [j for j, c in enumerate(confidence) if edges[i] < c <= edges[i + 1] or (i == 0 and c == 0)]
        counts.append(len(inside))
        if inside:
            accuracy, mean = np.mean([correct[j] for j in inside]), np.mean([confidence[j] for j in inside])
            expected += len(inside) / len(correct) * abs(accuracy - mean)
    assert calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)
    found = reliability_bins(confidence, correct, bins)
    assert [entry.count for entry in found] == [count for count in counts if count]
    assert sum(entry.correct for entry in found) == correct.sum()
    gaps = [abs(entry.correct - entry.count * entry.confidence) for entry in found]
    assert sum(gaps) / len(correct) == pytest.approx(expected, abs=1e-12)


def test_a_certain_and_right_model_has_no_calibration_error_and_a_certain_and_wrong_one_has_all():
    assert calibration_error(np.ones(5), np.ones(5, dtype=bool)) == 0
    assert calibration_error(np.ones(5), np.zeros(5, dtype=bool)) == 1


def test_few_rows_explain_a_calibration_error_that_many_do_not():
    rng = np.random.default_rng(0)
    few, many = rng.random(20), rng.random(2000)
    assert calibrated_error_bound(few) > 3 * calibrated_error_bound(many)
    # about one calibrated data set in 20 lies above the bound
    draws = rng.random((400, 20)) < few
    above = np.mean(
        [calibration_error(few, correct) > calibrated_error_bound(few, resamples=300) for correct in draws[:60]]
    )
    assert above < 0.2


@pytest.mark.parametrize("confidence", [[0.5, 1.1], [-0.1, 0.5], [0.5], [np.nan, 0.5]])
def test_calibration_refuses_what_is_no_confidence(confidence):
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]|equal length"):
        calibration_error(np.array(confidence), np.array([True, False]))


def test_the_brier_score_is_the_sum_over_all_options():
    assert brier_score(np.array([0.7, 0.2, 0.1]), 1) == pytest.approx(0.49 + 0.64 + 0.01)
    assert brier_score(np.array([0.0, 1.0]), 0) == 2
    assert brier_score(np.array([1.0, 0.0]), 0) == 0


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_right_one(samples):
    for correct in range(samples + 1):
        outcomes = [i < correct for i in range(samples)]
        for k in range(1, samples + 1):
            expected = np.mean([any(choice) for choice in combinations(outcomes, k)])
            assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(8, 2, 0), (8, 2, 9), (8, 9, 1), (8, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be_drawn(samples, correct, k):
    with pytest.raises(ValueError, match=rf"pass@{k} .* {correct} correct of {samples}"):
        pass_at_k(samples, correct, k)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_bootstrap_equals_scipys(seed):
    values = np.random.default_rng(9).exponential(size=60)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(seed), vectorized=False
    ).confidence_interval
    found = bootstrap_interval(lambda rows: float(values[rows].mean()), 60, resamples=500, seed=seed)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_estimates_hold_value_interval_and_rows():
    values = np.random.default_rng(1).random(50)
    mean, ratio = Estimate.mean(values), Estimate.ratio(values, np.full(50, 2.0))
    assert mean.value == pytest.approx(values.mean())
    assert mean.low < mean.value < mean.high
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((mean.value / 2, mean.low / 2, mean.high / 2))
    assert mean.rows == ratio.rows == 50
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        bootstrap_interval(lambda rows: 0.0, 0)


@pytest.mark.parametrize(("right", "rows"), [(0, 4), (4, 4), (3, 20), (1, 1)])
def test_the_interval_of_shares_is_wilsons(right, rows):
    values = np.arange(rows) < right
    assert mean_interval(values) == pytest.approx(wilson_interval(right, rows), abs=1e-12)
    low, high = wilson_interval(right, rows)
    both = 2 * values - 1.0  # one of -1 and 1
    assert mean_interval(both, (-1, 1)) == pytest.approx((2 * low - 1, 2 * high - 1), abs=1e-12)


def test_equal_values_have_an_interval_within_the_bounds_that_narrows_with_rows():
    assert mean_interval([0.3] * 10) == pytest.approx(equal_interval(0.3, 10), abs=1e-12)
    others = wilson_interval(0, 10)[1]  # the share that might be anything else
    assert mean_interval([0.3] * 10) == pytest.approx((0.3 * (1 - others), 0.3 + 0.7 * others), abs=1e-12)
    low, high = mean_interval([0.0] * 10, (-1, 1))
    assert -low == high == pytest.approx(others)
    widths = [np.ptp(mean_interval([0.3] * rows)) for rows in (1, 10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)
    # equal but for the order of a sum
    assert mean_interval([0.3, 0.1 + 0.2]) == pytest.approx(equal_interval(0.3, 2), abs=1e-12)


def test_other_means_are_bootstrapped():
    values = np.random.default_rng(2).random(40)
    expected = bootstrap_interval(lambda rows: float(values[rows].mean()), 40)
    assert mean_interval(values) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("values", "named"), [([0.2, 1.5], "1.5"), ([-0.1, 0.5], "-0.1"), ([], "no values")])
def test_a_mean_of_what_is_out_of_bounds_is_refused(values, named):
    with pytest.raises(ValueError, match=named):
        mean_interval(values)


def test_a_ratio_that_no_resample_changes_is_not_certain():
    found = Estimate.ratio([0, 0, 0], [4, 4, 4])
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(wilson_interval(0, 3)[1])


def test_an_interval_of_many_values_is_drawn_in_parts_with_the_same_draws():
    values = np.random.default_rng(0).random(20_001)
    tracemalloc.start()
    try:
        found = mean_interval(values)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 100 * 2**20  # at once: 1,000 times as many indices and values, 320 MB
    whole = values[np.random.default_rng(0).integers(0, len(values), (1000, len(values)))].mean(1)
    assert found == tuple(np.percentile(whole, [2.5, 97.5]))
