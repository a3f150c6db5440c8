"""Intervals and tests against scipy and statsmodels; priors on rows worked by hand."""

from itertools import product

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar

from rlmed.core.statistics import (
    ImageFreePrior,
    chance,
    leave_one_out_prior,
    majority_letter,
    mcnemar,
    wilson_interval,
)
from rlmed.core.types import Example


def row(options: str, answer: int) -> Example:
    """A row whose options are the words of `options`."""
    return Example(id="", image=None, question="?", options=tuple(options.split()), answer=answer)


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (1, 1), (210, 300), (1, 300), (299, 300)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_wilson_equals_scipy(right, n, level):
    expected = scipy.stats.binomtest(right, n).proportion_ci(confidence_level=level, method="wilson")
    assert wilson_interval(right, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_seventy_per_cent_of_300_is_about_five_points_either_way():
    low, high = wilson_interval(210, 300)
    assert low == pytest.approx(0.646, abs=5e-4)
    assert high == pytest.approx(0.749, abs=5e-4)


def test_wilson_bounds_are_exact_at_none_and_all():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(("right", "n", "level"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 95)])
def test_wilson_refuses_what_is_no_proportion(right, n, level):
    with pytest.raises(ValueError, match=rf"correct={right} of n={n} |level={level}"):
        wilson_interval(right, n, level)


@pytest.mark.parametrize("table", list(product([0, 40], [0, 1, 3, 17], [0, 1, 6, 17], [5])))
def test_mcnemar_equals_statsmodels(table):
    both, lost, gained, neither = table
    before = np.repeat([True, True, False, False], [both, lost, gained, neither])
    after = np.repeat([True, False, True, False], [both, lost, gained, neither])
    shuffle = np.random.default_rng(0).permutation(len(before))
    result = mcnemar(before[shuffle], after[shuffle])
    assert (result.gained, result.lost) == (gained, lost)
    expected = reference_mcnemar([[both, lost], [gained, neither]], exact=True).pvalue if lost + gained else 1.0
    assert result.p_value == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand():
    # five changed, all gained: 2 / 2^5
    assert mcnemar(np.zeros(5, bool), np.ones(5, bool)).p_value == 2 / 32
    # four gained, one lost: 2 * (1 + 5) / 2^5
    assert mcnemar(np.array([0, 0, 0, 0, 1], bool), np.array([1, 1, 1, 1, 0], bool)).p_value == 12 / 32


def test_mcnemar_of_many_rows_does_not_overflow():
    assert mcnemar(np.zeros(3000, bool), np.ones(3000, bool)).p_value == pytest.approx(0.0, abs=1e-300)
    half = np.arange(4000) % 2 == 0
    assert mcnemar(half, ~half).p_value == 1.0


def test_mcnemar_refuses_what_does_not_pair():
    with pytest.raises(ValueError, match="3 before and 2 after"):
        mcnemar(np.ones(3, bool), np.ones(2, bool))
    with pytest.raises(ValueError, match="int64"):
        mcnemar(np.array([1, 0]), np.array([True, False]))


def test_the_prior_takes_the_option_most_often_right_and_shares_ties():
    prior = ImageFreePrior.fit([row("head knee", 0), row("head chest", 0), row("head knee", 1)])
    # head was right twice, knee once, chest and spleen never
    assert prior.accuracy([row("knee head", 1)]) == 1.0
    assert prior.accuracy([row("knee head", 0)]) == 0.0
    assert prior.accuracy([row("spleen chest", 1)]) == 0.5
    assert prior.accuracy([row("spleen chest liver knee", 3), row("spleen chest liver", 0)]) == pytest.approx(2 / 3)


def test_the_prior_by_rate_divides_by_how_often_an_option_was_shown():
    prior = ImageFreePrior.fit([row("head knee", 0), row("head chest", 0), row("head knee", 1), row("head x", 1)])
    # head 2 of 4, knee 1 of 2, x 1 of 1, chest 0 of 1
    assert prior.accuracy([row("head x", 1)], by_rate=True) == 1.0
    assert prior.accuracy([row("head knee", 1)], by_rate=True) == 0.5
    assert prior.accuracy([row("head knee", 1)]) == 0.0


def test_an_option_never_met_has_the_rate_of_chance():
    prior = ImageFreePrior.fit([row("head knee a", 0), row("head knee a", 0), row("head knee a", 1)])
    # unmet 1/3 among three options; head 2/3, knee 1/3, a 0
    assert prior.accuracy([row("new a head", 2)], by_rate=True) == 1.0
    assert prior.accuracy([row("new a knee", 0)], by_rate=True) == 0.5
    # among two options it is 1/2, above knee
    assert prior.accuracy([row("new knee", 0)], by_rate=True) == 1.0
    assert prior.accuracy([row("new knee", 0)]) == 0.0


def test_option_texts_are_stripped_and_lower_cased():
    fitted = Example(id="", image=None, question="?", options=(" Head ", "knee"), answer=0)
    assert ImageFreePrior.fit([fitted]).accuracy([row("knee HEAD", 1)]) == 1.0


def test_leave_one_out_by_hand():
    rows = [row("head knee", 0), row("head chest", 0), row("head knee", 1)]
    # row 1: head 1, knee 1: 1/2. row 2: head 1, chest 0: 1. row 3: head 2, knee 0: 0.
    assert leave_one_out_prior(rows) == pytest.approx(0.5)
    # row 1: head 1/2, knee 1/1: 0. row 2: head 1/2, chest unmet 1/2: 1/2. row 3: head 2/2, knee
    # 0/1: 0.
    assert leave_one_out_prior(rows, by_rate=True) == pytest.approx(1 / 6)


def test_leave_one_out_equals_fitting_on_the_others():
    generator = np.random.default_rng(1)
    words = ["head", "knee", "chest", "abdomen", "spine", "liver"]
    rows = [row(" ".join(generator.permutation(words)[:4]), int(generator.integers(4))) for _ in range(60)]
    for by_rate in (False, True):
        each = [
            ImageFreePrior.fit(rows[:i] + rows[i + 1 :]).accuracy([rows[i]], by_rate=by_rate) for i in range(len(rows))
        ]
        assert leave_one_out_prior(rows, by_rate=by_rate) == pytest.approx(np.mean(each), abs=1e-12)


def test_answers_that_leak_through_the_options_are_found():
    # "head" is right whenever it is shown, the others never
    rows = [row("head a b c", 0), row("d head e f", 1), row("g h head a", 2)]
    assert leave_one_out_prior(rows) == 1.0
    assert chance(rows) == 0.25


def test_chance_is_the_mean_of_one_over_options():
    assert chance([row("a b", 0), row("a b c d", 0)]) == pytest.approx(0.375)


def test_majority_letter_is_fitted_on_the_training_rows_where_given():
    rows = [row("a b", 1), row("a b", 1), row("a b", 0)]
    assert majority_letter(rows) == pytest.approx(2 / 3)
    assert majority_letter(rows, [row("a b", 0)]) == pytest.approx(1 / 3)
    # equally often right: the first in the alphabet
    assert majority_letter(rows, [row("a b", 1), row("a b", 0)]) == pytest.approx(1 / 3)
    # a letter beyond the options of a row is wrong
    assert majority_letter(rows, [row("a b c", 2)]) == 0.0


@pytest.mark.parametrize(
    "score", [chance, majority_letter, leave_one_out_prior, ImageFreePrior.fit([row("a b", 0)]).accuracy]
)
def test_no_rows_are_an_error(score):
    with pytest.raises(ValueError, match="at least one row"):
        score([])
