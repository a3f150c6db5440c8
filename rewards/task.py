"""The main score of the example's task: one reward for any mixture of tasks."""

from __future__ import annotations

from rlmed.core.types import Completion, Example
from rlmed.tasks.registry import task_of


def task_reward(example: Example, completion: Completion) -> float:
    """Return the answer's main score in [0, 1]; 0 without an answer that can be read.

    It is exact match for open questions, F1 for labels, intersection over union for boxes, ROUGE-L
    for reports, and for multiple choice 1 for the correct letter alone in the answer tags.
    """
    task = task_of(example)
    return task.judge(example, completion.text).scores[task.main]
