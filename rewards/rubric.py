"""Several rewards, weighted and added up; the parts are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.answer_format import answer_format_reward
from rewards.base import Reward
from rewards.choice import choice_reward
from rewards.extra import guarded, load_reward
from rewards.format import format_reward
from rlmed.core.types import RolloutGroup, ScoredGroup

REWARDS: dict[str, Reward] = {
    "format": format_reward,
    "choice": choice_reward,
    "answer_format": answer_format_reward,
}
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
        """Add up `parts`, whose names must differ and whose weights must be finite."""
        names = [part.name for part in parts]
        if not parts or len(set(names)) < len(names):
            raise ValueError(f"a rubric needs rewards with different names, got: {', '.join(names) or 'none'}")
        for part in parts:
            if not math.isfinite(part.weight):
                raise ValueError(f"the weight of reward {part.name!r} is {part.weight}: give a finite number")
        self.parts = tuple(parts)

    @classmethod
    def from_config(cls, weights: Mapping[str, float], extra: Sequence[str] = (), *, timeout_s: float = 30.0) -> Rubric:
        """Build a rubric.

        Args:
            weights: weight of each reward in `REWARDS`, and of each function in `extra` that shall not have weight 1; a
                reward of weight 0 is only recorded.
            extra: the user's own functions as "module:function", each named after the function.
            timeout_s: seconds that one call of a user's function may take.

        Raises:
            ValueError: for a reward that does not exist or cannot be loaded.
        """
        own = {path.rpartition(":")[2]: path for path in extra}
        for name in weights:
            if name not in REWARDS and name not in own:
                raise ValueError(
                    f"reward.weights names {name!r}, which does not exist: choose from {', '.join(sorted(REWARDS))}, "
                    "or give your own function by reward.extra=[module:function]"
                )
        clash = sorted(set(own) & set(REWARDS))
        if clash or len(own) < len(extra):
            raise ValueError(
                f"reward.extra={list(extra)}: rewards go by the name of their function, and {clash or 'two of these'} "
                "cannot be told apart: rename the function"
            )
        parts = [WeightedReward(name, REWARDS[name], weight) for name, weight in weights.items() if name in REWARDS]
        for name, path in own.items():
            parts.append(WeightedReward(name, guarded(path, load_reward(path), timeout_s), weights.get(name, 1.0)))
        return cls(parts)

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """Reward every completion of a group.

        Raises:
            RewardError: when a user's function raises, hangs, or returns something other than a finite number.
        """
        example = group.prompt.example
        parts = {
            part.name: np.array(
                [part.reward(example, completion) for completion in group.completions], dtype=np.float32
            )
            for part in self.parts
        }
        total = sum(part.weight * parts[part.name] for part in self.parts)
        return ScoredGroup(group, np.asarray(total, dtype=np.float32), parts)
