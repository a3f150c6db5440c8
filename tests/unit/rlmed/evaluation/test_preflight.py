"""Facts and verdicts of the look before the first step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rlmed.core.types import (
    Completion,
    Example,
    FinishReason,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
)
from rlmed.evaluation.preflight import PreflightError, check, inspect

PROMPT = Prompt(Example(id="x", image=None, question="?", options=("a", "b"), answer=0), "", np.array([1]))


def group(texts: list[str], rewards: list[float], *, reason: FinishReason = "stop", form: float = 1.0) -> ScoredGroup:
    completions = tuple(
        Completion(np.arange(len(text) + 1), np.zeros(len(text) + 1, np.float32), text, reason) for text in texts
    )
    request = RolloutRequest(0, PROMPT, len(texts), SamplingParams())
    parts = {"format": np.full(len(texts), form, np.float32)}
    return ScoredGroup(RolloutGroup(request, completions), np.array(rewards, np.float32), parts)


def test_facts() -> None:
    report = inspect(
        [group(["a", "bb", "a", "c"], [1, 2, 1, 0]), group(["d", "d", "d", "d"], [1, 1, 1, 1], reason="length")]
    )
    assert (report.groups, report.completions, report.longest) == (2, 8, 3)
    assert report.reward_mean == pytest.approx(1.0)
    assert report.truncated == 0.5
    assert report.without_signal == 0.5
    assert report.distinct == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert "groups without learning signal 50%" in report.line()
    check(report, 512)  # one group with a learning signal is enough to start


def test_completions_kept_out_of_the_loss_teach_nothing() -> None:
    groups = [group(["a", "b"], [1, 2], reason="length")]
    check(inspect(groups), 512)
    with pytest.raises(PreflightError, match=r"raise rollout\.max_tokens"):
        check(inspect(groups, mask_truncated=True), 512)


@pytest.mark.parametrize(
    ("groups", "advice"),
    [
        ([group(["a", "a"], [1, 1])], r"rollout\.temperature"),
        ([group(["a", "b"], [0, 0], reason="length")], r"raise rollout\.max_tokens"),
        (
            [group(["<answer>A</answer> and", "<answer>B</answer> or"], [1, 1], reason="length")],
            r"100% of .*after .*rollout\.max_tokens=64: .*<\|im_end\|>, .*rlmed\.sft.*generation_config\.json.*rollout\.stop=",
        ),
        (
            [
                group(["<think>a", "<answer>B</answer> or"], [0, 0], reason="length"),
                group(["<think>b", "<think>c"], [0, 0], reason="length"),
            ],
            r"100% .*=64 before .*: raise rollout\.max_tokens; .*never .*<\|im_end\|>",
        ),
        (
            [group(["<think>a", "<think>c"], [0, 0], reason="length"), group(["c", "b"], [0, 0])] * 2
            + [group(["<think>a", "<think>c"], [0, 0], reason="length")],
            r"60% of .*=64 before .*: raise rollout\.max_tokens\. preflight",
        ),
        # stopped right after the answer, or cut long before it: not for want of an end
        ([group(["<answer>A</answer>", "<answer>B</answer>"], [0, 0])], "no completion earned any reward"),
        ([group(["a", "b"], [0, 0])], r"rlmed\.sft"),
        ([group(["a", "b"], [2, 2])], "too easy"),
    ],
)
def test_verdicts(groups: list[ScoredGroup], advice: str) -> None:
    with pytest.raises(PreflightError, match=advice):
        check(inspect(groups), 64, ["<|im_end|>"])


def test_a_missing_reward_is_named_and_not_the_model() -> None:
    lacking = dataclasses.replace(group(["a", "b"], [0, 0]), missing=("judge",))
    with pytest.raises(PreflightError, match=r"groups, reward judge missing in 2 .*judge could not be had in 100%"):
        check(inspect([lacking, lacking]), 512)
    report = inspect([lacking, group(["a", "b"], [1, 2])])
    assert report.reward_mean == 1.5
    check(report, 512)


def scored(asked: str, /, **parts: list[float]) -> ScoredGroup:
    """A group of two with a learning signal and these rewards, of an example of this task."""
    made = group(["a", "b"], [0, 1])
    example = PROMPT.example if asked == "choice" else Example(id="y", image=None, question="?", task=asked)
    prompt = dataclasses.replace(PROMPT, example=example)
    rollout = dataclasses.replace(made.rollout, request=dataclasses.replace(made.rollout.request, prompt=prompt))
    values = {name: np.array(given, np.float32) for name, given in parts.items()}
    return dataclasses.replace(made, rollout=rollout, reward_parts=values)


def test_a_reward_that_nothing_earns_is_said_on_one_line(caplog: pytest.LogCaptureFixture) -> None:
    nan = float("nan")
    groups = [
        scored("choice", task=[0, 0], format=[0, 1], judge=[nan, nan], punishes=[0, 0], noted=[0, 0]),
        scored("open", task=[0, nan], format=[0, 0], judge=[nan, nan], punishes=[0, 0], noted=[0, 0]),
    ]
    weights = {"task": 1.0, "format": 1.0, "judge": 1.0, "punishes": -1.0, "noted": 0.0}
    check(inspect(groups, weights=weights), 512)
    (said,) = caplog.messages
    assert said.startswith(
        "preflight: reward task is 0 for all 3 completions (tasks choice, open): the model never gives"
    )
    assert "rlmed.sft" in said
    assert "punishes" not in said
    caplog.clear()
    check(inspect(groups, weights=weights | {"punishes": 1.0}), 512)
    assert "reward task is 0" in caplog.messages[0]
    assert "your reward punishes is 0 for all 4 completions" in caplog.messages[1]
    assert "only punishes" in caplog.messages[1]
    assert "rlmed.sft" not in caplog.messages[1]
    caplog.clear()
    check(inspect([scored("choice", format=[0, 0], task=[0, 1])]), 512)
    assert "reward format is 0 for all 2 completions: the model never writes its tags" in caplog.text
    caplog.clear()
    many = [scored(name, task=[0, 0]) for name in ("choice", "open", "labels", "report", "grounding")]
    check(inspect(many), 512)
    assert "(tasks choice, open, labels, and 2 more)" in caplog.text
    caplog.clear()
    check(inspect([scored("choice", task=[0, 1])]), 512)
    assert caplog.messages == []


def test_a_task_that_nothing_earns_is_named_where_another_is_earned(caplog: pytest.LogCaptureFixture) -> None:
    groups = [scored("choice", task=[0, 1] * 4), scored("open", task=[0] * 8), scored("report", task=[0] * 4)]
    check(inspect(groups), 512)
    (said,) = caplog.messages
    assert said.startswith("preflight: reward task is 0 for all 8 completions of open: ")


def test_rewards_that_the_length_limit_took_are_not_laid_to_knowledge(caplog: pytest.LogCaptureFixture) -> None:
    cut = scored("choice", format=[0, 0, 0], task=[0, 0, 0], noted=[0, 0, 1])
    cut = dataclasses.replace(cut, rollout=group(["a", "b", "c"], [0, 0, 1], reason="length").rollout)
    check(inspect([cut]), 512)
    (said,) = caplog.messages
    assert "100% of the completions were cut at rollout.max_tokens=512" in said
    assert "rlmed.sft" not in said


def test_a_reward_of_ones_own_that_punishes_is_not_the_reason_of_questions_that_are_too_easy() -> None:
    same = dataclasses.replace(scored("choice", format=[1, 1], rude=[0, 0]), rewards=np.full(2, 2, np.float32))
    with pytest.raises(PreflightError, match=r"\(2\.00\): the questions are too easy"):
        check(inspect([same]), 512)


def test_without_signal_a_reward_that_nothing_earns_is_the_reason() -> None:
    same = dataclasses.replace(scored("choice", format=[1, 1], task=[0, 0]), rewards=np.ones(2, np.float32))
    with pytest.raises(PreflightError, match=r"same reward \(1\.00\): reward task is 0 for all 2 completions"):
        check(inspect([same]), 512)


def test_how_completions_are_cut_is_a_fact() -> None:
    cut = group(["<answer>A</answer> and", "<think>so"], [1, 0], reason="length")
    report = inspect([cut, group(["<answer>A</answer>", "b"], [1, 0])])
    assert (report.truncated, report.went_on) == (0.5, 0.25)
    assert "length 50% (25% after their answer), " in report.line()
    assert "after their answer" not in inspect([group(["a", "b"], [1, 0], reason="length")]).line()
