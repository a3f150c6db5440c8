"""Several rewards, weighted and added up; the parts are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.base import Reward
from rewards.choice import choice_reward
from rewards.extra import guarded, load_reward
from rewards.format import format_reward
from rlmed.core.types import RolloutGroup, ScoredGroup

REWARDS: dict[str, Reward] = {"format": format_reward, "choice": choice_reward}
"""Rewards by the name that `reward.weights` uses."""


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """One part of a rubric."""

    name: str
    reward: Reward
    weight: float


class Rubric:
    """Scores groups: the weighted sum of its parts.

    Example:
        Rubric.from_config({"format": 1.0, "choice": 1.0}) is the reward of MedVLM-R1, between 0 and 2.
    """

    def __init__(self, parts: Sequence[WeightedReward]) -> None:
        """Add up `parts`, whose names must differ."""
        names = [part.name for part in parts]
        if not parts or len(set(names)) < len(names):
            raise ValueError(f"a rubric needs rewards with different names, got: {', '.join(names) or 'none'}")
        self.parts = tuple(parts)

    @classmethod
    def from_config(cls, weights: Mapping[str, float], extra: Sequence[str] = (), *, timeout_s: float = 30.0) -> Rubric:
        """Build a rubric.

        Args:
            weights: weight of each reward in `REWARDS`.
            extra: the user's own functions as "module:function", each with weight 1 and named after the function.
            timeout_s: seconds that one call of a user's function may take.

        Raises:
            ValueError: for a reward that does not exist or cannot be loaded.
        """
        for name in weights:
            if name not in REWARDS:
                raise ValueError(
                    f"reward.weights names {name!r}, which does not exist: choose from {', '.join(sorted(REWARDS))}, "
                    "or give your own function by reward.extra=[module:function]"
                )
        parts = [WeightedReward(name, REWARDS[name], weight) for name, weight in weights.items()]
        for path in extra:
            parts.append(WeightedReward(path.rpartition(":")[2], guarded(path, load_reward(path), timeout_s), 1.0))
        return cls(parts)

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """Reward every completion of a group.

        Raises:
            RewardError: when a user's function raises, hangs, or returns something other than a finite number.
        """
        example = group.prompt.example
        parts = {
            part.name: np.array([part.reward(example, completion) for completion in group.completions], dtype=np.float32)
            for part in self.parts
        }
        total = sum(part.weight * parts[part.name] for part in self.parts)
        return ScoredGroup(group, np.asarray(total, dtype=np.float32), parts)
