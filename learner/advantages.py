"""Advantage of each completion from the rewards of its group.

With r the G rewards of one group:

    grpo     (r - mean(r)) / (std(r) + std_eps)      GRPO, arXiv 2402.03300 (sample std, ddof 1)
    dr_grpo  r - mean(r)                             Dr. GRPO, arXiv 2503.20783: no division by the std, which gives
                                                     weight to questions almost always or almost never answered
    rloo     r_i - mean(r_j, j != i)                 RLOO, arXiv 2402.14740: a baseline independent of completion i
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]


def group_advantages(rewards: Tensor, kind: AdvantageKind, std_eps: float = 1e-4) -> Tensor:
    """Advantages by the formula `kind` of the module docstring.

    Args:
        rewards: float32 [B, G], one group a row, or [G].
        kind: "grpo", "dr_grpo" or "rloo".
        std_eps: added to the standard deviation (grpo only); MedVLM-R1 uses 1e-4.

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
    elif kind == "dr_grpo":
        advantages = exact - mean
    else:
        advantages = (exact - mean) / (exact.std(dim=-1, keepdim=True) + std_eps)
    return advantages.float()
