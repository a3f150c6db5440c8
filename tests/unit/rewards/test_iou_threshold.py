"""Boxes paid by a threshold that rises with the policy version, and other tasks as ever."""

from __future__ import annotations

import numpy as np
import pytest

from rewards.rubric import Rubric
from rewards.task import IouSchedule
from rlmed.core.types import Completion, Example, Prompt, RolloutGroup, RolloutRequest, SamplingParams

SCHEDULE = IouSchedule(start=0.2, end=0.6, steps=40)
TRUTH = {"boxes": [[0.0, 0.0, 1.0, 1.0]], "frame": [1000, 1000]}
BOXES = Example("1", None, "Where?", task="grounding", truth=TRUTH)
OVERLAPS = (0.1, 0.2, 0.4, 0.6, 1.0)


def group(example: Example, answers: list[str], versions: list[int]) -> RolloutGroup:
    tokens = np.arange(3)
    completions = tuple(
        Completion(tokens, tokens.astype(np.float32), f"<answer>{answer}</answer>", "stop", 0, version)
        for answer, version in zip(answers, versions, strict=True)
    )
    request = RolloutRequest(0, Prompt(example, "", tokens), len(answers), SamplingParams())
    return RolloutGroup(request, completions)


def boxes_at(version: int, newest: int | None = None) -> RolloutGroup:
    """Five completions that overlap the truth by `OVERLAPS`, the last of version `newest`."""
    versions = [version] * 4 + [version if newest is None else newest]
    return group(BOXES, [f"[[0, 0, 1000, {1000 * overlap:g}]]" for overlap in OVERLAPS], versions)


@pytest.mark.parametrize(
    ("version", "threshold", "paid"),
    [(0, 0.2, [0, 1, 1, 1, 1]), (20, 0.4, [0, 0, 1, 1, 1]), (30, 0.5, [0, 0, 0, 1, 1]), (400, 0.6, [0, 0, 0, 1, 1])],
)
def test_boxes_are_paid_by_the_threshold_of_their_version(version: int, threshold: float, paid: list[int]) -> None:
    rubric = Rubric.from_config({"task": 2.0}, iou=SCHEDULE)
    scored = rubric.score(boxes_at(version))
    assert scored.reward_parts["task"].tolist() == paid
    assert scored.rewards.tolist() == [2 * value for value in paid]
    assert rubric.metrics()["iou_threshold"] == pytest.approx(threshold, abs=1e-12)
    assert "iou_threshold" not in rubric.metrics()  # none was applied since


def test_what_was_scored_before_does_not_matter() -> None:
    used = Rubric.from_config({"task": 1.0}, iou=SCHEDULE)
    for version in (400, 30, 0):
        used.score(boxes_at(version))
    assert used.metrics()["iou_threshold"] == pytest.approx(0.6)
    resumed = Rubric.from_config({"task": 1.0}, iou=SCHEDULE)
    assert used.score(boxes_at(20)).rewards.tolist() == resumed.score(boxes_at(20)).rewards.tolist()


def test_completions_of_a_group_are_paid_by_one_threshold_though_weights_came_between() -> None:
    scored = Rubric.from_config({"task": 1.0}, iou=SCHEDULE).score(boxes_at(0, newest=20))
    assert scored.rewards.tolist() == [0, 0, 1, 1, 1]


def test_other_tasks_and_unreadable_boxes_are_paid_as_ever() -> None:
    words = Example("2", None, "What?", task="labels", truth={"labels": ["cyst", "mass"], "known": []})
    rubric = Rubric.from_config({"task": 1.0}, iou=SCHEDULE)
    scored = rubric.score(group(words, ["cyst", "cyst, mass"], [0, 0]))
    assert scored.rewards.tolist() == [np.float32(2 / 3), 1.0]
    assert "iou_threshold" not in rubric.metrics()
    assert rubric.score(group(BOXES, ["nowhere", "[]"], [0, 0])).rewards.tolist() == [0, 0]


def test_without_a_schedule_the_overlap_itself_is_paid() -> None:
    rubric = Rubric.from_config({"task": 1.0})
    np.testing.assert_allclose(rubric.score(boxes_at(400)).rewards, OVERLAPS, atol=1e-7)  # float32
    assert "iou_threshold" not in rubric.metrics()


def test_a_threshold_without_boxes_to_pay_is_refused() -> None:
    words = Example("2", None, "What?", task="labels", truth={"labels": ["cyst"], "known": []})
    rubric = Rubric.from_config({"task": 1.0}, iou=SCHEDULE)
    with pytest.raises(ValueError, match=r"reward\.iou\.kind=threshold .*\(2 labels\).* task grounding"):
        rubric.check_tasks([words, words])
    rubric.check_tasks([words, BOXES])
    Rubric.from_config({"task": 1.0}).check_tasks([words])
