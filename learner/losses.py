"""Policy-gradient loss of the GRPO family as one function of settings.

Per trained token t of completion i, with ratio r = exp(logprobs - old_logprobs) and advantage A_i:

    loss_t = -w_t * surrogate(r_t, A_i) + kl_coef * kl_t

    w_t                  1, or min(exp(old_logprobs - rollout_logprobs), importance_cap)
    surrogate  none      r*A
               ppo       min(r*A, clip(r)*A),  clip(r) = r within [1 - clip_ratio_low, 1 + clip_ratio_high]
               dual      ppo, but for A < 0 at least dual_clip*A
               cispo     stop_gradient(clip(r)) * A * logprobs
    ratio_level          "sequence": every r of a completion is exp(mean over its tokens of logprobs - old_logprobs)

and the loss of an optimizer step is a weighted sum over its tokens, with |o_i| the trained tokens
of completion i:

    sequence_mean        1 / (sequences * |o_i|)
    token_mean           1 / tokens
    sequence_sum         1 / (sequences * max_tokens)

| method | settings |
| --- | --- |
| GRPO, arXiv 2402.03300 | `algo=grpo` |
| MedVLM-R1 as released (arXiv 2502.19634) | `clip="none"`, and `old_logprobs=logprobs.detach()` |
| DAPO, 2503.14476 | `aggregation="token_mean"`, `clip_ratio_high=0.28`, `kl_coef=0` |
| Dr. GRPO, 2503.20783 | `aggregation="sequence_sum"`, `kl_coef=0` |
| GSPO, 2507.18071 | `ratio_level="sequence"`, `clip_ratio_low=3e-4`, `clip_ratio_high=4e-4`, `kl_coef=0` |
| CISPO, 2506.13585 | `clip="cispo"`, `clip_ratio_low=1` (no lower bound), `aggregation="token_mean"`, `kl_coef=0` |
| dual-clip PPO, 1912.09729 | `clip="dual"`, `dual_clip=3` |
| truncated importance sampling | `importance_cap=2` (F. Yao et al., "Your Efficient RL Framework Secretly Brings You \
Off-Policy RL Training", 2025) |

As released, MedVLM-R1 maximises exp(logprobs - stop_gradient(logprobs)) * A - kl_coef * k3. The
ratio is then always 1, so `clip="ppo"` gives the same loss and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.kl import kl_estimate, mismatch_kl
from learner.metrics import LossMetrics, MetricMax, mean_metric
from rlmed.core.config.schema import LossConfig


@dataclass(frozen=True)
class LossDenominators:
    """Divisors of one optimizer step's loss, counted over *all* its micro-batches and ranks.

    Example:
        >>> count_denominators([5, 0, 9], max_tokens=512)
        LossDenominators(tokens=14.0, sequences=2.0, max_tokens=512)
    """

    tokens: float
    """Number of trained tokens."""
    sequences: float
    """Number of completions with at least one trained token."""
    max_tokens: int
    """Constant length by which Dr. GRPO divides: the limit on a completion's tokens."""


def count_denominators(trained_tokens: Iterable[int], max_tokens: int) -> LossDenominators:
    """Count a step's denominators from each completion's trained tokens (True in the loss mask).

    Completions without a trained token do not count, so a fully masked filler changes nothing.
    Denominators of several ranks add up in `tokens` and `sequences`.
    """
    counts = [count for count in trained_tokens if count > 0]
    return LossDenominators(tokens=float(sum(counts)), sequences=float(len(counts)), max_tokens=max_tokens)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor,
    loss_mask: Tensor,
    denominators: LossDenominators,
    config: LossConfig,
) -> tuple[Tensor, LossMetrics]:
    """Compute a micro-batch's share of its optimizer step's loss (formulas: module docstring).

    Shares and their gradients add up to those of the whole step, however it is split, as long as no
    completion is cut in two. Ranks that average gradients must multiply by the number of ranks.

    Args:
        logprobs: float32 [N], log-probabilities of the micro-batch's completion tokens,
            concatenated (or in any order); the only input that may require gradients.
        old_logprobs: float32 [N], the ratio's denominator: by the learner before the step, or the
            rollout's.
        rollout_logprobs: float32 [N], by the engine that sampled.
        ref_logprobs: float32 [N], by the frozen reference; may be None if `kl_coef` is 0.
        advantages: float32 [S], one per completion.
        sequence_ids: int64 [N] in 0..S-1, the completion of each token.
        loss_mask: bool [N], True where a token is trained. Other tokens have no influence, whatever
            their values.
        denominators: counted over the whole optimizer step.
        config: the settings.

    Returns:
        The loss, float32 [], and metrics over the trained tokens: `ratio`, `ratio_max`,
        `clip_fraction_low`, `clip_fraction_high` (tokens whose gradient the clip cuts off; for
        cispo, whose weight it changes), with clip="dual" `clip_fraction_dual`, `mismatch_kl`, and
        `kl` with a reference. The loss is NaN if a trained token has a non-finite input, even one
        that a clip or clamp would hide.

    Raises:
        ValueError: for mismatched shapes, half-precision log-probabilities, an input with gradients
            that must not have any, `kl_coef` without reference, or zero denominators although
            tokens are trained.
    """
    frozen = {"old_logprobs": old_logprobs, "rollout_logprobs": rollout_logprobs}
    if ref_logprobs is not None:
        frozen["ref_logprobs"] = ref_logprobs
    elif config.kl_coef > 0.0:
        raise ValueError(f"kl_coef={config.kl_coef} but ref_logprobs is None: pass the reference's, or set kl_coef=0")
    _check_inputs(logprobs, frozen, advantages, sequence_ids, loss_mask)

    # Drop untrained tokens here, so nothing below sees them. (Multiplying by the mask would keep
    # their NaNs.)
    frozen = {name: values[loss_mask] for name, values in frozen.items()}
    return _loss_of_trained(
        logprobs[loss_mask], frozen, advantages, sequence_ids[loss_mask], denominators=denominators, config=config
    )


def _loss_of_trained(
    logprobs: Tensor,
    frozen: Mapping[str, Tensor],
    advantages: Tensor,
    ids: Tensor,
    *,
    denominators: LossDenominators,
    config: LossConfig,
) -> tuple[Tensor, LossMetrics]:
    """Return loss and metrics of trained tokens [N] only and advantages [S]; see `policy_loss`."""
    old, rollout = frozen["old_logprobs"], frozen["rollout_logprobs"]
    advantage = advantages[ids]
    lengths = torch.zeros_like(advantages).index_add(0, ids, torch.ones_like(advantage))  # |o_i|
    log_ratio = logprobs - old
    if config.ratio_level == "sequence":
        sums = torch.zeros_like(advantages, dtype=log_ratio.dtype).index_add(0, ids, log_ratio)
        log_ratio = sums[ids] / lengths[ids]
    ratio = log_ratio.exp()

    loss_per_token = -_surrogate(logprobs, ratio, advantage, config)
    if config.importance_cap is not None:
        loss_per_token = loss_per_token * (old - rollout).exp().clamp(max=config.importance_cap)
    metrics = _metrics(ratio.detach(), advantage, config)
    metrics["mismatch_kl"] = mean_metric(mismatch_kl(old, rollout, torch.ones_like(ids, dtype=torch.bool)))
    if "ref_logprobs" in frozen and config.kl_estimator != "none":
        kl = kl_estimate(logprobs, frozen["ref_logprobs"], config.kl_estimator)
        metrics["kl"] = mean_metric(kl)
        if config.kl_coef > 0.0:
            loss_per_token = loss_per_token + config.kl_coef * kl

    loss = (loss_per_token / _token_denominators(lengths[ids], denominators, config.aggregation)).sum()
    # exp(-inf) = 0 and the clamps would turn a non-finite log-probability into a loss that looks
    # healthy.
    finite = torch.stack([torch.isfinite(x).all() for x in (logprobs, advantage, *frozen.values())]).all()
    return torch.where(finite, loss, torch.full_like(loss, math.nan)), metrics


def _surrogate(logprobs: Tensor, ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    """Return the objective to maximise, per token [N]."""
    if config.clip == "none":
        return ratio * advantages
    clipped = ratio.clamp(1.0 - config.clip_ratio_low, 1.0 + config.clip_ratio_high)
    if config.clip == "cispo":
        return clipped.detach() * advantages * logprobs
    pessimistic = torch.minimum(ratio * advantages, clipped * advantages)
    if config.clip == "dual":
        bounded = torch.maximum(pessimistic, config.dual_clip * advantages)
        return torch.where(advantages < 0, bounded, pessimistic)
    return pessimistic


def _token_denominators(lengths: Tensor, denominators: LossDenominators, aggregation: str) -> Tensor:
    """Return each token's divisor, [N]; `lengths` [N] are the trained tokens of its completion."""
    if lengths.numel() and min(denominators.tokens, denominators.sequences, denominators.max_tokens) <= 0:
        raise ValueError(
            f"{denominators} for a micro-batch with {lengths.numel()} trained tokens: count the denominators over all "
            "completions of the optimizer step with count_denominators"
        )
    if aggregation == "sequence_mean":
        return lengths * denominators.sequences
    if aggregation == "token_mean":
        return torch.full_like(lengths, denominators.tokens)
    return torch.full_like(lengths, denominators.sequences * denominators.max_tokens)


def _metrics(ratio: Tensor, advantages: Tensor, config: LossConfig) -> LossMetrics:
    """Compute ratio and clip metrics from tensors [N] without gradient."""
    below, above = ratio < 1.0 - config.clip_ratio_low, ratio > 1.0 + config.clip_ratio_high
    if config.clip in ("ppo", "dual"):
        below, above = below & (advantages < 0), above & (advantages > 0)
    elif config.clip == "none":
        below, above = torch.zeros_like(below), torch.zeros_like(above)
    metrics: LossMetrics = {
        "ratio": mean_metric(ratio),
        # A ratio is never negative, so the added 0 only matters without trained tokens.
        "ratio_max": MetricMax(torch.cat([ratio, ratio.new_zeros(1)]).max()),
        "clip_fraction_low": mean_metric(below.to(ratio.dtype)),
        "clip_fraction_high": mean_metric(above.to(ratio.dtype)),
    }
    if config.clip == "dual":
        metrics["clip_fraction_dual"] = mean_metric(((ratio > config.dual_clip) & (advantages < 0)).to(ratio.dtype))
    return metrics


def _check_inputs(
    logprobs: Tensor, frozen: Mapping[str, Tensor], advantages: Tensor, sequence_ids: Tensor, loss_mask: Tensor
) -> None:
    """Raise on mistakes that would otherwise train wrongly without an error."""
    if logprobs.dim() != 1 or advantages.dim() != 1:
        raise ValueError(
            f"logprobs {tuple(logprobs.shape)} and advantages {tuple(advantages.shape)}: policy_loss takes flat packed "
            "tensors, [N] per token and [S] per completion"
        )
    for name, values in {**frozen, "sequence_ids": sequence_ids, "loss_mask": loss_mask}.items():
        if values.shape != logprobs.shape:
            shapes = f"{tuple(values.shape)} does not fit logprobs {tuple(logprobs.shape)}"
            raise ValueError(f"{name} {shapes}: pass one value per completion token of the micro-batch")
    if loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask is {loss_mask.dtype}: pass torch.bool (integers would index instead of mask)")
    for name, values in {"logprobs": logprobs, **frozen, "advantages": advantages}.items():
        if values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} are {values.dtype}, too coarse for differences of log-probabilities: use float32")
    for name, values in {**frozen, "advantages": advantages}.items():
        if values.requires_grad:
            raise ValueError(f"{name} carry gradients, which would distort those of logprobs: detach() them")
