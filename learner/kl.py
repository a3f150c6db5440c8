"""KL divergence estimated from the log-probabilities of sampled tokens.

For tokens drawn from the policy p, with log-ratio d = ref_logprobs - logprobs, KL(p || ref) is the
mean of any of

    k1 = -d                  unbiased, high variance, can be negative
    k2 = d**2 / 2            biased, low variance
    k3 = exp(d) - 1 - d      unbiased, low variance, never negative

(J. Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html.)

As *penalties* they differ more than as estimates, because a loss differentiates the tokens'
log-probabilities and not the distribution that they were drawn from. On tokens of the current
policy the expected gradient of k1 is zero (it penalises nothing), that of k2 is the gradient of
KL(p || ref), and that of k3 is the gradient of the other direction, KL(ref || p). GRPO (arXiv
2402.03300) uses k3.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Upper bound of d in k3; exp(d) overflows float32 from d = 88.8 on.

One such token would make the whole step non-finite. Training recovers from no penalty of exp(20) =
4.9e8, so the bound changes no healthy run. Above it the gradient is 0. No lower bound is needed:
exp(d) only goes to 0, and k3 to -1 - d.
"""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) per token by formula `estimator` of the module docstring.

    Args:
        logprobs: float32 [N] of the policy; gradients flow to it.
        ref_logprobs: float32 [N] of the frozen reference.
        estimator: "k1", "k2", "k3", or "none" for zeros.

    Returns:
        float32 [N]. NaN where an input is NaN.

    Raises:
        ValueError: for an unknown estimator.

    Example:
        >>> kl_estimate(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0]), "k3")
        tensor([0.0000, 0.7183])
    """
    if estimator == "k1":
        return logprobs - ref_logprobs
    if estimator == "k2":
        return 0.5 * (logprobs - ref_logprobs).square()
    if estimator == "k3":
        return _k3(ref_logprobs - logprobs)
    if estimator == "none":
        return torch.zeros_like(logprobs)
    raise ValueError(f"Invalid kl_estimator={estimator}; expected one of k1, k2, k3, none")


def mismatch_kl(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Estimate KL(rollout engine || learner) per token by k3, to monitor how far the two disagree.

    On-policy (`algo.max_staleness=0`) both are log-probabilities under the same weights, so a value
    well above rounding (at most 1e-6 in float32, about 1e-3 in bfloat16) means a defect in one of
    them, or a policy version that was not applied.

    Args:
        old_logprobs: float32 [N], recomputed by the learner before the step.
        rollout_logprobs: float32 [N], as returned by the engine with the tokens.
        mask: bool [N], True where a token counts.

    Returns:
        float32 [N] without gradient, 0 where `mask` is False: the mean is `.sum() / mask.sum()`.
    """
    log_ratio = (old_logprobs - rollout_logprobs).detach()
    return torch.where(mask, _k3(log_ratio), torch.zeros_like(log_ratio))


def _k3(log_ratio: Tensor) -> Tensor:
    """Return exp(d) - 1 - d with d bounded; by expm1, which keeps float32 digits near d = 0."""
    bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
    return torch.expm1(bounded) - bounded
