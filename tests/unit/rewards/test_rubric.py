"""Rubrics: weighted sum per completion, parts kept unweighted, impossible settings refused."""

import sys
from types import ModuleType

import numpy as np
import pytest

from rewards.rubric import Rubric, WeightedReward, per_completion
from rlmed.core.types import Completion, Example, Prompt, RolloutGroup, RolloutRequest, SamplingParams

EXAMPLE = Example(id="q1", image=None, question="Which?", options=("head", "chest", "abdomen", "knee"), answer=1)
TEXTS = (
    "<think>x</think><answer>B</answer>",
    "no tags",
    "<think>x</think><answer>C</answer>",
    "<answer>B)</answer>",
)


@pytest.fixture
def group() -> RolloutGroup:
    prompt = Prompt(EXAMPLE, "text", np.zeros(3, dtype=np.int64))
    completions = [
        Completion(np.zeros(n + 1, np.int64), np.zeros(n + 1, np.float32), t, "stop") for n, t in enumerate(TEXTS)
    ]
    return RolloutGroup(RolloutRequest(0, prompt, len(TEXTS), SamplingParams()), tuple(completions))


@pytest.fixture
def own(monkeypatch) -> ModuleType:
    module = ModuleType("own_rewards")
    module.__file__ = "own_rewards.py"
    module.length = lambda example, completion: len(completion.token_ids)
    module.format = lambda example, completion: 0.0
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    return module


def test_the_papers_reward_is_the_plain_sum(group):
    scored = Rubric.from_config({"format": 1.0, "choice": 1.0}).score(group)
    assert scored.rewards.tolist() == [2.0, 0.0, 1.0, 0.5]
    assert {name: part.tolist() for name, part in scored.reward_parts.items()} == {
        "format": [1.0, 0.0, 1.0, 0.0],
        "choice": [1.0, 0.0, 0.0, 0.5],
    }
    assert scored.rewards.dtype == scored.reward_parts["choice"].dtype == np.float32
    assert scored.rollout is group


def test_weights_scale_the_sum_and_leave_the_parts(group):
    scored = Rubric.from_config({"format": 0.5, "choice": -2.0}).score(group)
    assert scored.rewards.tolist() == [-1.5, 0.0, 0.5, -1.0]
    assert scored.reward_parts["choice"].tolist() == [1.0, 0.0, 0.0, 0.5]


def test_weight_zero_records_only(group):
    scored = Rubric.from_config({"format": 0, "choice": 1}).score(group)
    assert scored.rewards.tolist() == [1.0, 0.0, 0.0, 0.5]
    assert scored.reward_parts["format"].tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(("weights", "expected"), [({}, [1, 2, 3, 4]), ({"length": 0.5}, [0.5, 1, 1.5, 2])])
def test_an_own_function_weighs_one_or_what_its_name_says(group, own, weights, expected):
    scored = Rubric.from_config(weights, ["own_rewards:length"]).score(group)
    assert scored.rewards.tolist() == expected
    assert scored.reward_parts["length"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_part_sees_example_and_completion_in_order(group):
    seen = []
    rubric = Rubric(
        [
            WeightedReward(
                "spy",
                per_completion(lambda example, completion: seen.append((example.id, completion.text)) or 0.0),
                1.0,
            )
        ]
    )
    rubric.score(group)
    assert seen == [("q1", text) for text in TEXTS]


@pytest.mark.parametrize(
    ("weights", "extra", "reason"),
    [
        ({"accuracy": 1.0}, [], r"reward\.weights .*'accuracy'.*not exist.* answer_format, brevity, "),
        ({"taks": 1.0}, [], r"'taks', which does not exist: did you mean task\? Else choose"),
        ({"lenght": 1.0}, ["own_rewards:length"], r"'lenght', which .* did you mean length\?"),
        ({"agreement": 1.0}, [], r"renamed to reward\.weights\.reasoning_consistency"),
        ({"format": float("nan")}, [], "weight of reward 'format' is nan"),
        ({"format": float("inf")}, [], "weight of reward 'format' is inf"),
        ({"likelihood_gain": 0.0}, [], "'likelihood_gain', which asks the learner .* debug.learn=false: choose"),
        ({}, [], "got: none"),
        ({"format": 1.0}, ["own_rewards:format"], r"'own_rewards:format'.* reward of rlmed: rename"),
        ({}, ["own_rewards:length", "other:length"], "'own_rewards:length', 'other:length'.* the same one: rename"),
        ({"format": 1.0}, ["own_rewards:nothing"], "'nothing' does not exist"),
    ],
)
def test_impossible_settings_are_errors(own, weights, extra, reason):
    with pytest.raises(ValueError, match=reason):
        Rubric.from_config(weights, extra)


def test_parts_of_the_same_name_are_an_error():
    part = WeightedReward("x", per_completion(lambda example, completion: 0.0), 1.0)
    with pytest.raises(ValueError, match="different names, got: x, x"):
        Rubric([part, part])
