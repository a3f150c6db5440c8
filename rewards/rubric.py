"""Weighted sum of several rewards that keeps each part."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.answer_format import answer_format_reward
from rewards.base import GroupReward, Likelihood, Reward, SplitCommonPrefix
from rewards.brevity import brevity_reward
from rewards.choice import choice_reward
from rewards.extra import guarded, load_reward
from rewards.format import format_reward
from rewards.format_parts import format_parts_reward
from rewards.likelihood_gain import likelihood_gain
from rewards.reasoning_consistency import reasoning_consistency_reward
from rewards.references import references_of
from rewards.repetition import repetition_reward
from rewards.self_consistency import self_consistency_reward
from rewards.slow_parts import COMPARING, SLOW_NAMES, SlowRewards
from rewards.slow_reward import SlowReward
from rewards.task import IOU, IouSchedule, ThresholdReward, task_reward
from rlmed.core.spelling import closest
from rlmed.core.types import Example, FloatArray, RolloutGroup, ScoredGroup
from rlmed.tasks.registry import task_of

REWARDS: dict[str, Reward] = {
    "format": format_reward,
    "choice": choice_reward,
    "answer_format": answer_format_reward,
    "format_parts": format_parts_reward,
    "reasoning_consistency": reasoning_consistency_reward,
    "brevity": brevity_reward,
    "repetition": repetition_reward,
    "task": task_reward,
}
"""Rewards of one completion, by their name in `reward.weights`."""
GROUP_REWARDS: dict[str, GroupReward] = {"self_consistency": self_consistency_reward}
"""Rewards of a whole group."""
LIKELIHOOD_REWARDS: dict[str, Callable[[Likelihood, SplitCommonPrefix], GroupReward]] = {
    "likelihood_gain": likelihood_gain
}
"""Rewards of a group that query the policy for likelihoods."""
CHOICE_ONLY = ("choice", "self_consistency", "reasoning_consistency", "likelihood_gain")
"""Rewards that mean nothing for other tasks than multiple choice."""
NAMES = tuple(sorted([*REWARDS, *GROUP_REWARDS, *LIKELIHOOD_REWARDS]))
"""Names that `reward.weights` may use without `reward.extra` or a server."""
KNOWN = tuple(sorted([*NAMES, *SLOW_NAMES]))
"""Names that `reward.weights` may use without `reward.extra`."""


def per_completion(reward: Reward) -> GroupReward:
    """Lift a reward of one completion to a group."""

    def rewards(group: RolloutGroup) -> FloatArray:
        example = group.prompt.example
        return np.array([reward(example, completion) for completion in group.completions], dtype=np.float32)

    return rewards


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """One part of a rubric."""

    name: str
    reward: GroupReward
    weight: float


class Rubric:
    """Scores groups by the weighted sum of its parts.

    Example:
        >>> rubric = Rubric.from_config({"format": 1.0, "choice": 1.0})  # MedVLM-R1's: between 0 and 2
        >>> [part.name for part in rubric.parts]
        ['format', 'choice']
    """

    def __init__(self, parts: Sequence[WeightedReward]) -> None:
        """Combine `parts`, whose names must differ and whose weights must be finite."""
        names = [part.name for part in parts]
        if not parts or len(set(names)) < len(names):
            raise ValueError(f"a rubric needs rewards with different names, got: {', '.join(names) or 'none'}")
        for part in parts:
            if not math.isfinite(part.weight):
                raise ValueError(f"the weight of reward {part.name!r} is {part.weight}: give a finite number")
        self.parts = tuple(parts)
        self._slow = {part.name: part.reward for part in parts if isinstance(part.reward, SlowReward)}
        self._seconds = 0.0
        self._missing: Counter[str] = Counter()

    @property
    def is_slow(self) -> bool:
        """True if rewards take time, so that `begin` before `score` saves some."""
        return bool(self._slow)

    @classmethod
    def from_config(
        cls,
        weights: Mapping[str, float],
        extra: Sequence[str] = (),
        *,
        timeout_s: float = 30.0,
        likelihood: Likelihood | None = None,
        split_common_prefix: SplitCommonPrefix | None = None,
        slow: SlowRewards | None = None,
        iou: IouSchedule | None = None,
    ) -> Rubric:
        """Build a rubric.

        Args:
            weights: weight of each reward in `NAMES`, and of each function in `extra` (default 1);
                a reward of weight 0 is only recorded.
            extra: the user's own functions as "module:function", each named after the function.
            timeout_s: time limit in seconds for one call of a user's function.
            likelihood: serves the rewards that query the policy; None without a learner.
            split_common_prefix: makes the tokens that `likelihood` scores.
            slow: makes the rewards that take time; None refuses them.
            iou: pays boxes by this threshold in the reward `task`; None pays their overlap.

        Raises:
            ValueError: for a reward that is unknown, cannot be loaded, or needs a likelihood where
                there is none; for settings of slow rewards where none is slow.
        """
        own = {path.rpartition(":")[2]: path for path in extra}
        slow = slow or SlowRewards()
        slow.check(weights)
        _check_names(weights, extra, own)
        parts = [
            WeightedReward(
                name,
                slow.make(name) if name in SLOW_NAMES else _built_in(name, likelihood, split_common_prefix, iou),
                weight,
            )
            for name, weight in weights.items()
            if name in KNOWN
        ]
        for name, path in own.items():
            function = load_reward(path)
            taking_time = slow.of_user(name, path, function, timeout_s)
            reward = taking_time or per_completion(guarded(path, function, timeout_s))
            parts.append(WeightedReward(name, reward, weights.get(name, 1.0)))
        slow.check_read({part.name for part in parts if isinstance(part.reward, SlowReward)}, extra)
        return cls(parts)

    def check_tasks(self, examples: Iterable[Example]) -> None:
        """Check that every reward means something for the rows to learn from.

        Raises:
            ValueError: for a reward of multiple choice, and rows of another task; for one that
                compares texts, and rows without any to compare with; for a threshold of boxes, and
                no row with boxes.
        """
        examples = list(examples)
        tasks = Counter(example.task for example in examples)
        by_overlap = any(isinstance(part.reward, ThresholdReward) for part in self.parts)
        if by_overlap and examples and not any(task_of(example).main == IOU for example in examples):
            raise ValueError(
                "reward.iou.kind=threshold is for rows that ask for boxes, and training rows have other tasks ("
                f"{_counted(tasks)}): leave reward.iou out, or give rows of task grounding in data.train"
            )
        comparing = [part.name for part in self.parts if part.name in COMPARING]
        bare = next((example for example in examples if comparing and not references_of(example)), None)
        if bare is not None:
            raise ValueError(
                f"reward.weights names {', '.join(comparing)}, which compares texts, and training row {bare.id!r} of task "
                f"{bare.task} has no reference text: set reward=task"
            )
        others = Counter(example.task for example in examples if not example.is_choice)
        wrong = [part.name for part in self.parts if part.name in CHOICE_ONLY]
        if others and wrong:
            raise ValueError(
                f"reward.weights names {', '.join(wrong)}, for multiple choice alone, and training rows have other tasks ("
                f"{_counted(others)}): set reward=task"
            )

    def begin(self, group: RolloutGroup) -> None:
        """Ask for a group's slow rewards without waiting; from any thread, and raises nothing."""
        for reward in self._slow.values():
            reward.begin(group)

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """Score every completion of a group, in the loop's thread; waits for slow rewards.

        A reward that is missing for one of them is NaN there, and left out of the whole group's
        sum: a completion must not be better or worse than others for it.

        Raises:
            RewardError: if a user's function raises, hangs, or returns anything but a finite
                number, or a slow reward cannot be had.
        """
        start = time.perf_counter()
        self.begin(group)
        values = {part.name: part.reward(group) for part in self.parts if part.name not in self._slow}
        self._seconds += time.perf_counter() - start
        slow = {name: reward.with_notes(group) for name, reward in self._slow.items()}
        values |= {name: found for name, (found, _) in slow.items()}
        notes = {name: texts for name, (_, texts) in slow.items() if any(texts)}
        total = np.zeros(len(group.completions), dtype=np.float32)
        lacking, counted = [], False
        for part in self.parts:
            missing = int(np.isnan(values[part.name]).sum()) if part.name in self._slow else 0
            if missing:
                self._missing[part.name] += missing
                lacking += [part.name] if part.weight else []
            else:
                total = total + part.weight * values[part.name]
                counted = counted or part.weight != 0
        parts = {part.name: values[part.name] for part in self.parts}
        rewarded = counted or not lacking
        return ScoredGroup(group, np.asarray(total, dtype=np.float32), parts, tuple(lacking), notes, rewarded)

    def metrics(self) -> dict[str, float]:
        """Return the seconds that rewards took, and how many are missing, since the last reading.

        Calls that go on at a time are added up. With a threshold for boxes, also that.
        """
        seconds = self._seconds + sum(reward.read_seconds() for reward in self._slow.values())
        missing = {
            f"reward/{name}_missing": float(self._missing[name])
            for name, reward in self._slow.items()
            if reward.limits.on_failure == "missing"
        }
        self._seconds, self._missing = 0.0, Counter()
        by_threshold = (part.reward for part in self.parts if isinstance(part.reward, ThresholdReward))
        thresholds = [found for reward in by_threshold if (found := reward.read_threshold()) is not None]
        applied = {"iou_threshold": max(thresholds)} if thresholds else {}
        return {"seconds/reward_calls": seconds, **missing, **applied}

    def close(self) -> None:
        """Drop what slow rewards have not been asked for yet."""
        for reward in self._slow.values():
            reward.close()


def _counted(tasks: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in tasks.most_common())


def _check_names(weights: Iterable[str], extra: Sequence[str], own: Mapping[str, str]) -> None:
    """Refuse unknown names, and two rewards of one name."""
    for name in weights:
        if name == "agreement" and name not in own:
            raise ValueError("reward.weights.agreement: renamed to reward.weights.reasoning_consistency")
        if name not in (*NAMES, *SLOW_NAMES, *own):
            near = closest(name, [*KNOWN, *own])
            meant = f"did you mean {near}? Else choose" if near else "choose"
            raise ValueError(
                f"reward.weights names {name!r}, which does not exist: {meant} from {', '.join(KNOWN)}, "
                "or give your own function by reward.extra=[module:function]"
            )
    clash = sorted(set(own) & set(KNOWN))
    if clash or len(own) < len(extra):
        why = f"{', '.join(clash)} is a reward of rlmed" if clash else "two of these have the same one"
        raise ValueError(
            f"reward.extra={list(extra)}: rewards go by the name of their function, and {why}: rename the function"
        )


def _built_in(
    name: str,
    likelihood: Likelihood | None,
    split_common_prefix: SplitCommonPrefix | None,
    iou: IouSchedule | None,
) -> GroupReward:
    if REWARDS.get(name) is task_reward and iou is not None:
        return ThresholdReward(iou)
    if name in REWARDS:
        return per_completion(REWARDS[name])
    if name in GROUP_REWARDS:
        return GROUP_REWARDS[name]
    if likelihood is None or split_common_prefix is None:
        raise ValueError(
            f"reward.weights names {name!r}, which asks the learner how likely answers are, and there is none with "
            "debug.learn=false: choose rewards without it, for example reward=format_choice, or set debug.learn=true"
        )
    return LIKELIHOOD_REWARDS[name](likelihood, split_common_prefix)
