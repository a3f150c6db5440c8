"""The main score of the example's task: one reward for any mixture of tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlmed.core.config.rewarding import IouConfig
from rlmed.core.types import Completion, Example, FloatArray, RolloutGroup
from rlmed.tasks.registry import task_of

IOU = "iou"
"""Name of a main score that `ThresholdReward` compares with its threshold."""


def task_reward(example: Example, completion: Completion) -> float:
    """Return the answer's main score in [0, 1]; 0 without an answer that can be read.

    It is exact match for open questions, F1 for labels, intersection over union for boxes, ROUGE-L
    for reports, and for multiple choice 1 for the correct letter alone in the answer tags.
    """
    task = task_of(example)
    return task.judge(example, completion.text).scores[task.main]


@dataclass(frozen=True, slots=True)
class IouSchedule:
    """A threshold of intersection over union that rises linearly with the policy version.

    Example:
        >>> [round(IouSchedule(0.1, 0.5, 100).at(version), 2) for version in (0, 50, 100, 300)]
        [0.1, 0.3, 0.5, 0.5]
    """

    start: float
    end: float
    steps: int
    """Optimizer steps from start to end."""

    @classmethod
    def of(cls, config: IouConfig) -> IouSchedule | None:
        """Return the schedule of `reward.iou`; None if it pays the mean overlap."""
        return cls(config.start, config.end, config.steps) if config.kind == "threshold" else None

    def at(self, version: int) -> float:
        """Return the threshold for completions of a policy version."""
        return self.start + (self.end - self.start) * min(version / self.steps, 1.0)


class ThresholdReward:
    """`task_reward` that pays boxes 1 from a threshold on and else 0; other tasks as ever.

    The threshold is a function of the group's policy version, its newest completion's, and so the
    same for all completions that are compared, and after a resume.
    """

    def __init__(self, schedule: IouSchedule) -> None:
        """Pay by this schedule."""
        self._schedule = schedule
        self._highest: float | None = None

    def __call__(self, group: RolloutGroup) -> FloatArray:
        """Return the rewards of a group; see `rewards.base.GroupReward`."""
        example = group.prompt.example
        scores = np.array([task_reward(example, completion) for completion in group.completions], dtype=np.float32)
        if task_of(example).main != IOU:
            return scores
        threshold = self._schedule.at(max(completion.max_version for completion in group.completions))
        self._highest = max(threshold, self._highest or 0.0)
        return (scores >= threshold - 1e-6).astype(np.float32)

    def read_threshold(self) -> float | None:
        """Return the highest threshold since the last reading; None if it was not applied."""
        highest, self._highest = self._highest, None
        return highest
