"""Advantage of each completion from the rewards of its group.

With r the G rewards of one group:

    grpo     (r - mean(r)) / (std(r) + std_eps)      GRPO, arXiv 2402.03300 (sample std, ddof 1)
    dr_grpo  r - mean(r)                             Dr. GRPO, arXiv 2503.20783: no division by the std, which gives
                                                     weight to questions almost always or almost never answered
    rloo     r_i - mean(r_j, j != i)                 RLOO, arXiv 2402.14740: a baseline independent of completion i

Rewards of several data sets or modalities can differ in scale, and then one of them drives the update: MedGRPO (arXiv
2512.06581) collapses unless rewards are normalized by data set. A shift cancels against the group's mean, so the scale is
all that is left to normalize. With `spread`, the running standard deviation within the groups of one modality
(`RunningSpread`),

    grpo, dr_grpo  (r - mean(r)) / (spread + std_eps)
    rloo           (r_i - mean(r_j, j != i)) / (spread + std_eps)

so the mean square of advantages is the same for each modality, while within one a question keeps the weight that its own
spread gives it. (Mean of the group and spread of many groups: arXiv 2508.08221, there the spread of the whole batch.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]

SPREAD_DECAY = 0.99
"""Weight of a group in a running spread against the next one of its modality: the latest hundred or so count."""


@dataclass(slots=True)
class RunningSpread:
    """Standard deviation of rewards within the groups of each modality, by its name.

    With v_1 … v_n the sample variances (ddof 1) of its groups, oldest first, it is sqrt(Σ β^(n-i)·v_i / Σ β^(n-i)), β = 0.99:
    an exponential mean that is not biased towards a start.

    Example:
        >>> spread = RunningSpread()
        >>> spread.add("CT", torch.tensor([0.0, 2.0]))
        >>> spread.of("CT")
        1.4142135623730951
    """

    moments: dict[str, list[float]] = field(default_factory=dict)
    """Both sums of the formula, by name; plain numbers, as a checkpoint keeps them."""

    def add(self, name: str, rewards: Tensor) -> None:
        """Count a group.

        Args:
            name: of its modality.
            rewards: float32 [G], at least 2 and not all equal: who cannot learn from a group need not know its scale.
        """
        total, weight = self.moments.get(name, [0.0, 0.0])
        variance = float(rewards.double().var())
        self.moments[name] = [SPREAD_DECAY * total + variance, SPREAD_DECAY * weight + 1]

    def of(self, name: str) -> float:
        """The spread of a modality; 0 before its first group."""
        total, weight = self.moments.get(name, [0.0, 1.0])
        return math.sqrt(total / weight)


def group_advantages(
    rewards: Tensor, kind: AdvantageKind, std_eps: float = 1e-4, *, spread: float | None = None
) -> Tensor:
    """Advantages by the formula `kind` of the module docstring.

    Args:
        rewards: float32 [B, G], one group a row, or [G].
        kind: "grpo", "dr_grpo" or "rloo".
        std_eps: added to the standard deviation that is divided by; MedVLM-R1 uses 1e-4.
        spread: divided by instead of the group's own standard deviation, and with any kind; not negative.

    Returns:
        float32, the shape of `rewards`. A group whose rewards are all equal gets exactly 0, so that "this group teaches
        nothing" can be asked with `== 0`.

    Raises:
        ValueError: unknown kind, another shape, fewer than 2 completions in a group, a reward that is not finite.

    Example:
        >>> group_advantages(torch.tensor([2.0, 0.0, 1.0, 2.0]), "dr_grpo")
        tensor([ 0.7500, -1.2500, -0.2500,  0.7500])
    """
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"advantage kind {kind!r} is unknown: use one of {', '.join(get_args(AdvantageKind))}")
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}: group_advantages takes [B, G] or [G]")
    group_size = rewards.shape[-1]
    if group_size < 2:
        raise ValueError(
            f"group_size={group_size} with group-relative advantage {kind!r}: every advantage would be 0 or undefined; "
            "sample at least 2 completions per prompt"
        )
    if not bool(torch.isfinite(rewards).all()):
        bad = torch.nonzero(~torch.isfinite(rewards))[0].tolist()
        raise ValueError(
            f"reward {rewards[tuple(bad)].item()} at position {bad} is not finite: drop the group, or make the reward "
            "function return a finite number"
        )
    # In float32 the mean of equal rewards can differ from them by an ulp; divided by std_eps that is no longer noise.
    # In float64 the sum of up to 2**29 equal float32 numbers is exact, so equal rewards give exactly 0.
    exact = rewards.double()
    mean = exact.mean(dim=-1, keepdim=True)
    if kind == "rloo":
        others = (exact.sum(dim=-1, keepdim=True) - exact) / (group_size - 1)
        advantages = exact - others
    else:
        advantages = exact - mean
    if spread is not None:
        advantages = advantages / (spread + std_eps)
    elif kind == "grpo":
        advantages = advantages / (exact.std(dim=-1, keepdim=True) + std_eps)
    return advantages.float()
