"""KL estimators: values by hand, what they estimate, where gradients pull, and extreme inputs."""

import math

import pytest
import torch

from learner.kl import MAX_LOG_RATIO, kl_estimate, mismatch_kl
from tests.rounding import rounding

LOGITS = torch.tensor([0.3, -0.8, 1.1, 0.0, -0.2], dtype=torch.float64)
REF_LOGPROBS = torch.log_softmax(torch.tensor([0.1, 0.4, 0.5, -1.0, 0.2], dtype=torch.float64), 0)

ROUNDING = rounding(5 * 8, 2, torch.float64)
"""Sums over five tokens of eight operations each, on values below 2."""


def test_values_worked_by_hand():
    # p = 0.75 and 0.25 against ref = 0.5: d = ln(2/3) = -0.405465 and ln 2 = 0.693147 k1 = -d; k2 =
    # d*d/2 = 0.082201, 0.240227; k3 = 2/3 - 1 + 0.405465 = 0.072132, 2 - 1 - 0.693147 = 0.306853
    logprobs, ref = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    expected = {
        "k1": [0.405465, -0.693147],
        "k2": [0.082201, 0.240227],
        "k3": [0.072132, 0.306853],
        "none": [0.0, 0.0],
    }
    for estimator, values in expected.items():
        result = kl_estimate(logprobs, ref, estimator)
        # six digits
        torch.testing.assert_close(result, torch.tensor(values), atol=1e-6 + rounding(8), rtol=0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    logprobs = torch.log_softmax(LOGITS, 0)
    exact = (logprobs.exp() * (logprobs - REF_LOGPROBS)).sum()
    estimate = (logprobs.exp() * kl_estimate(logprobs, REF_LOGPROBS, estimator)).sum()
    torch.testing.assert_close(estimate, exact, atol=ROUNDING, rtol=0)


def gradient(loss_of_logprobs):
    """Gradient at LOGITS of a function of the log-probabilities of all tokens."""
    logits = LOGITS.clone().requires_grad_()
    loss_of_logprobs(torch.log_softmax(logits, 0)).backward()
    return logits.grad


@pytest.mark.parametrize(
    ("estimator", "exact_loss"),
    [
        ("k1", lambda logprobs: 0.0 * logprobs.sum()),
        ("k2", lambda logprobs: (logprobs.exp() * (logprobs - REF_LOGPROBS)).sum()),
        ("k3", lambda logprobs: (REF_LOGPROBS.exp() * (REF_LOGPROBS - logprobs)).sum()),
    ],
)
def test_expected_gradient_as_a_penalty(estimator, exact_loss):
    """The module docstring's claims: zero, KL(p || ref), KL(ref || p), by sums over all tokens."""
    sampled = gradient(lambda lp: (lp.detach().exp() * kl_estimate(lp, REF_LOGPROBS, estimator)).sum())
    torch.testing.assert_close(sampled, gradient(exact_loss), atol=ROUNDING, rtol=0)


def test_k3_keeps_its_digits_near_zero():
    # d = 1e-4: k3 = d**2/2 + d**3/6 = 5.00017e-9, below the float32 spacing at 1, where exp(d) - 1
    # - d is lost
    delta = torch.tensor([1e-4])
    value = kl_estimate(-delta, torch.zeros(1), "k3").item()
    # a difference of two numbers of 1e-4
    assert value == pytest.approx(5.00017e-9, abs=rounding(1, 1e-4), rel=0)


@pytest.mark.parametrize("log_ratio", [100.0, 1e4, math.inf])
def test_k3_does_not_overflow(log_ratio):
    logprobs = torch.tensor([-log_ratio], requires_grad=True)
    value = kl_estimate(logprobs, torch.zeros(1), "k3")
    value.sum().backward()
    assert value.item() == pytest.approx(math.expm1(MAX_LOG_RATIO) - MAX_LOG_RATIO, rel=rounding(8))
    assert logprobs.grad.item() == 0.0


def test_k3_is_exact_at_the_other_end():
    # d = -300: exp(d) = 0, so k3 = -1 + 300 and its gradient 1 - exp(d) = 1
    logprobs = torch.tensor([0.0], requires_grad=True)
    value = kl_estimate(logprobs, torch.tensor([-300.0]), "k3")
    value.sum().backward()
    assert value.item() == 299.0
    assert logprobs.grad.item() == 1.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_nan_stays_nan(estimator):
    assert kl_estimate(torch.tensor([math.nan]), torch.zeros(1), estimator).isnan().all()


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="kl_estimator=k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_mismatch_kl_worked_by_hand():
    # old / rollout = 0.5/0.25 = 2: 2 - 1 - ln 2 = 0.306853; equal: 0; masked: 0 even where it is
    # NaN
    old = torch.tensor([0.5, 0.5, math.nan, 0.1]).log().requires_grad_()
    rollout = torch.tensor([0.25, 0.5, 0.5, 0.9]).log()
    result = mismatch_kl(old, rollout, torch.tensor([True, True, False, False]))
    torch.testing.assert_close(result, torch.tensor([0.306853, 0.0, 0.0, 0.0]), atol=1e-6 + rounding(8), rtol=0)
    assert not result.requires_grad


def test_mismatch_kl_is_the_divergence_of_the_engine_from_the_learner():
    """Tokens come from the engine, so the mean must be KL(rollout || old), not the reverse."""
    old = torch.log_softmax(LOGITS, 0)
    mean = (REF_LOGPROBS.exp() * mismatch_kl(old, REF_LOGPROBS, torch.ones(5, dtype=torch.bool))).sum()
    torch.testing.assert_close(mean, (REF_LOGPROBS.exp() * (REF_LOGPROBS - old)).sum(), atol=ROUNDING, rtol=0)
