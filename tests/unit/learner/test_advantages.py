"""Advantages: values worked by hand, identities, and what must be refused."""

import math

import pytest
import torch

from learner.advantages import group_advantages
from tests.rounding import rounding

DIGITS = 1e-6 + rounding(10, 2)
"""Values worked by hand have six."""

ESTIMATORS = ("grpo", "dr_grpo", "rloo")


def test_values_worked_by_hand():
    # mean 1.25, deviations 0.75 -1.25 -0.25 0.75, sample variance (0.5625 + 1.5625 + 0.0625 +
    # 0.5625) / 3 = 0.916667, std 0.957427; 0.75 / 0.957527 = 0.783268, -1.25 / 0.957527 =
    # -1.305446, -0.25 / 0.957527 = -0.261089
    rewards = torch.tensor([2.0, 0.0, 1.0, 2.0])
    expected = {
        "grpo": [0.783268, -1.305446, -0.261089, 0.783268],
        "dr_grpo": [0.75, -1.25, -0.25, 0.75],
        # the others' means: (0+1+2)/3 = 1, (2+1+2)/3 = 5/3, (2+0+2)/3 = 4/3, (2+0+1)/3 = 1
        "rloo": [1.0, -5 / 3, -1 / 3, 1.0],
    }
    for estimator, values in expected.items():
        torch.testing.assert_close(group_advantages(rewards, estimator), torch.tensor(values), atol=DIGITS, rtol=0)


def test_std_eps_is_added_to_the_sample_std():
    # rewards 0 and 1: sample std sqrt(2 * 0.25 / 1) = 0.707107; with eps 0.292893 the divisor is 1
    eps = 1 - math.sqrt(0.5)
    torch.testing.assert_close(group_advantages(torch.tensor([0.0, 1.0]), "grpo", eps), torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_are_independent_rows(estimator):
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    together = group_advantages(rewards, estimator)
    assert together.dtype == torch.float32
    for row, expected in zip(rewards, together, strict=True):
        assert torch.equal(group_advantages(row, estimator), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_order_within_a_group_does_not_matter(estimator):
    rewards = torch.rand(7, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    torch.testing.assert_close(group_advantages(rewards[order], estimator), group_advantages(rewards, estimator)[order])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("group_size", [2, 3, 7, 8, 49])
def test_equal_rewards_give_exactly_zero(estimator, group_size):
    # 0.1, 0.7 and 1.3 are no binary fractions: a mean in float32 is off by an ulp for some of these
    # sizes
    for reward in (0.1, 0.7, 1.3):
        assert not group_advantages(torch.full((group_size,), reward), estimator).any()


def test_a_float32_mean_would_fail_the_test_above():
    rows = [torch.full((size,), reward) for size in (2, 3, 7, 8, 49) for reward in (0.1, 0.7, 1.3)]
    assert any((row - row.mean()).any() for row in rows)


def test_rloo_is_the_centred_reward_scaled():
    # r_i - (sum - r_i)/(G-1) = G/(G-1) * (r_i - mean)
    rewards = torch.rand(3, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(group_advantages(rewards, "rloo"), 8 / 7 * group_advantages(rewards, "dr_grpo"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(1,), (4, 1)])
def test_a_group_of_one_is_refused(estimator, shape):
    with pytest.raises(ValueError, match=r"group_size=1 .*at least 2"):
        group_advantages(torch.ones(shape), estimator)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused_and_located(bad):
    with pytest.raises(ValueError, match=r"index \[1, 2\] is not finite"):
        group_advantages(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, bad]]), "grpo")


def test_unknown_kind_and_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="advantage=gae"):
        group_advantages(torch.ones(4), "gae")
    with pytest.raises(ValueError, match=r"\(1, 2, 2\)"):
        group_advantages(torch.ones(1, 2, 2), "grpo")
