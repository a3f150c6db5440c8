"""Advantages of completions from the rewards of their group.

With r the G rewards of one group:

    grpo     (r - mean(r)) / (std(r) + std_eps)      GRPO, arXiv 2402.03300 (sample std, ddof 1)
    dr_grpo  r - mean(r)                             Dr. GRPO, arXiv 2503.20783: without the
                                                     division by the std, which gives weight to
                                                     questions almost always or never answered
    rloo     r_i - mean(r_j, j != i)                 RLOO, arXiv 2402.14740: a baseline independent of completion i

Rewards of different data sets or modalities can differ in scale, and then one of them dominates the
update: MedGRPO (arXiv 2512.06581) collapses unless rewards are normalized by data set. A shift
cancels against the group's mean, so only the scale remains to normalize. With `running_std`, the
running standard deviation within the groups of one modality (`RunningRewardStd`),

    grpo, dr_grpo  (r - mean(r)) / (running_std + std_eps)
    rloo           (r_i - mean(r_j, j != i)) / (running_std + std_eps)

so the mean square of advantages is equal across modalities, while within one a question keeps the
weight of its own standard deviation. (Mean of the group, standard deviation of many groups: arXiv
2508.08221, there of the whole batch.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rlmed.core.types import ScoredGroup, TrainGroup

ESTIMATORS = ("grpo", "dr_grpo", "rloo")

STD_DECAY = 0.99
"""Decay of a group's weight per further group of its modality: the latest hundred or so count."""


@dataclass(slots=True)
class RunningRewardStd:
    """Running standard deviation of rewards within the groups of each modality, by name.

    With v_1 … v_n the sample variances (ddof 1) of a modality's groups, oldest first, it is
    sqrt(Σ β^(n-i)·v_i / Σ β^(n-i)), β = 0.99: an exponential mean without bias towards its start.

    Example:
        >>> running = RunningRewardStd()
        >>> running.add("CT", torch.tensor([0.0, 2.0]))
        >>> running.of("CT")
        1.4142135623730951
    """

    moments: dict[str, list[float]] = field(default_factory=dict)
    """Both sums of the formula by name; plain numbers, for checkpoints."""

    def add(self, name: str, rewards: Tensor) -> None:
        """Add a group.

        Args:
            name: its modality.
            rewards: float32 [G], at least 2 and not all equal: a group that trains nothing must not
                change the scale.
        """
        total, weight = self.moments.get(name, [0.0, 0.0])
        variance = float(rewards.double().var())
        self.moments[name] = [STD_DECAY * total + variance, STD_DECAY * weight + 1]

    def of(self, name: str) -> float:
        """Return the standard deviation of a modality; 0 before its first group."""
        total, weight = self.moments.get(name, [0.0, 1.0])
        return math.sqrt(total / weight)


def has_reward_variance(scored: ScoredGroup) -> bool:
    """Return False if all rewards of a group are equal, which makes every advantage zero."""
    return float(np.ptp(scored.rewards)) > 1e-6


def has_learning_signal(scored: ScoredGroup, *, mask_truncated: bool) -> bool:
    """Return whether a group gives gradient: rewards differ, and not all completions are masked."""
    masked = mask_truncated and all(entry.finish_reason == "length" for entry in scored.rollout.completions)
    return has_reward_variance(scored) and not masked


def group_advantages(
    rewards: Tensor, estimator: str, std_eps: float = 1e-4, *, running_std: float | None = None
) -> Tensor:
    """Compute advantages by the formula `estimator` of the module docstring.

    Args:
        rewards: float32 [B, G], one group per row, or [G].
        estimator: "grpo", "dr_grpo" or "rloo".
        std_eps: added to the divisor; MedVLM-R1 uses 1e-4.
        running_std: replaces the group's own standard deviation as divisor, with any estimator; not
            negative.

    Returns:
        float32, the shape of `rewards`. A group of equal rewards gets exactly 0, so `== 0` tests
        for a group that trains nothing.

    Raises:
        ValueError: for an unknown estimator, another shape, fewer than 2 completions in a group, or
            a non-finite reward.

    Example:
        >>> group_advantages(torch.tensor([2.0, 0.0, 1.0, 2.0]), "dr_grpo")
        tensor([ 0.7500, -1.2500, -0.2500,  0.7500])
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"Invalid advantage={estimator}; expected one of {', '.join(ESTIMATORS)}")
    if rewards.dim() not in (1, 2):
        raise ValueError(f"Invalid rewards of shape {tuple(rewards.shape)}; expected [B, G] or [G]")
    group_size = rewards.shape[-1]
    if group_size < 2:
        raise ValueError(
            f"group_size={group_size} with group-relative advantage {estimator!r}: every advantage would be 0 or undefined; "
            "sample at least 2 completions per prompt"
        )
    if not bool(torch.isfinite(rewards).all()):
        bad = torch.nonzero(~torch.isfinite(rewards))[0].tolist()
        raise ValueError(
            f"reward {rewards[tuple(bad)].item()} at index {bad} is not finite: drop the group, or return a finite "
            "number from the reward function"
        )
    # In float32 the mean of equal rewards can differ from them by an ulp; divided by std_eps that
    # is no longer noise. In float64 the sum of up to 2**29 equal float32 numbers is exact, so equal
    # rewards give exactly 0.
    exact = rewards.double()
    mean = exact.mean(dim=-1, keepdim=True)
    if estimator == "rloo":
        others = (exact.sum(dim=-1, keepdim=True) - exact) / (group_size - 1)
        advantages = exact - others
    else:
        advantages = exact - mean
    if running_std is not None:
        advantages = advantages / (running_std + std_eps)
    elif estimator == "grpo":
        advantages = advantages / (exact.std(dim=-1, keepdim=True) + std_eps)
    return advantages.float()


class AdvantageEstimator:
    """Computes advantages of a step's groups; owns the running reward statistics by modality.

    Example:
        >>> AdvantageEstimator("grpo").estimate([])
        []
    """

    def __init__(self, estimator: str, normalize_by: str | None = None) -> None:
        """Estimate by the formula `estimator`; see the module docstring for `normalize_by`."""
        self._estimator, self._by_modality = estimator, normalize_by == "modality"
        self._running = RunningRewardStd()

    def estimate(self, batch: Sequence[ScoredGroup]) -> list[TrainGroup]:
        """Return the groups with advantages; the batch updates the running statistics first."""
        rewards = [torch.from_numpy(scored.rewards) for scored in batch]
        if not self._by_modality:
            advantages = [group_advantages(values, self._estimator) for values in rewards]
        else:
            names = [scored.rollout.prompt.example.modality for scored in batch]
            # in order of the requests: the order of completion must not matter
            for index in sorted(range(len(batch)), key=lambda index: batch[index].rollout.request.index):
                if has_reward_variance(batch[index]) and not batch[index].missing:
                    self._running.add(names[index], rewards[index])
            advantages = [
                # before a modality's first whole group there is no deviation to divide by
                group_advantages(
                    values,
                    self._estimator,
                    running_std=self._running.of(name) if name in self._running.moments else None,
                )
                for values, name in zip(rewards, names, strict=True)
            ]
        return [TrainGroup(scored, values.numpy()) for scored, values in zip(batch, advantages, strict=True)]

    def metrics(self) -> dict[str, float]:
        """Return the running reward standard deviation by modality; empty without normalization."""
        return {f"reward_std/{name or 'none'}": self._running.of(name) for name in self._running.moments}

    def state(self) -> dict[str, list[float]]:
        """Return the state for a checkpoint, as JSON."""
        return {name: list(moments) for name, moments in self._running.moments.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Resume from `state`."""
        self._running = RunningRewardStd({name: list(moments) for name, moments in state.items()})
