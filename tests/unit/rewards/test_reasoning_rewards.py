"""Guards, consistency, likelihood gain: values worked by hand, finite numbers for any text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.brevity import brevity_reward
from rewards.conclusion import argued_option
from rewards.deadline import call_within
from rewards.likelihood_gain import likelihood_gain
from rewards.repetition import repetition_reward
from rewards.rubric import NAMES, Rubric
from rewards.self_consistency import self_consistency_reward
from rlmed.core.types import (
    Completion,
    Example,
    FloatArray,
    IntArray,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    SamplingParams,
)  # fmt: skip
from tests.rounding import rounding

EXAMPLE = Example(id="q1", image=None, question="?", options=("head", "chest", "left knee", "knee"), answer=1)
PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    " ",
    "\n",
    "B",
    "(c)",
    "option ",
    "not ",
    " or ",
    "knee",
    "left ",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=20).map("".join)


def completion(text: str) -> Completion:
    return Completion(np.zeros(1, np.int64), np.zeros(1, np.float32), text, "stop")


def make_group(texts: Sequence[str]) -> RolloutGroup:
    prompt = Prompt(EXAMPLE, "", np.array([7]))
    return RolloutGroup(RolloutRequest(0, prompt, len(texts), SamplingParams()), tuple(map(completion, texts)))


def thought(reasoning: str, answer: str = "B") -> str:
    return f"<think>{reasoning}</think><answer>{answer}</answer>"


def split_common_prefix(texts: Sequence[str]) -> tuple[IntArray, list[IntArray]]:
    """One token a character, except that ">" and what follows it are one, as for Qwen2."""
    for place, letter in enumerate("ABCD"):
        texts = [text.replace(f">{letter}", chr(0xE000 + place)) for text in texts]
    return token_ids(texts[0][:-1]), [token_ids(text[-1]) for text in texts]


def token_ids(text: str) -> IntArray:
    return np.array([ord(character) for character in text], dtype=np.int64)


class Policy:
    """Gives merged letters these probabilities after reasoning with "rib", equal ones elsewhere."""

    def __init__(self, chances: Sequence[float]) -> None:
        self.chances, self.questions = chances, []

    def __call__(self, questions: Sequence[tuple[Prompt, Sequence[IntArray]]]) -> list[list[FloatArray]]:
        self.questions += questions
        return [[self._logprobs(token_ids) for token_ids in texts] for _, texts in questions]

    def _logprobs(self, token_ids: IntArray) -> FloatArray:
        # of no account, being the same for all letters
        logprobs = np.full(len(token_ids), -5.0, np.float32)
        knows = "rib" in "".join(map(chr, token_ids))
        logprobs[-1] = math.log((self.chances if knows else [0.01] * 4)[token_ids[-1] - 0xE000])
        return logprobs


@pytest.mark.parametrize(
    ("chances", "gain"),
    [
        ([0.1, 0.7, 0.1, 0.1], math.log(0.7 / 0.25) / math.log(4)),
        # the other words don't matter
        ([0.01, 0.07, 0.01, 0.01], math.log(0.7 / 0.25) / math.log(4)),
        ([0.25, 0.25, 0.25, 0.25], 0.0),
        ([0.4, 0.2, 0.2, 0.2], math.log(0.2 / 0.25) / math.log(4)),
        ([1e-30, 1.0, 1e-30, 1e-30], 1.0),
        ([1.0, 1e-30, 1e-30, 1e-30], -1.0),  # clipped
    ],
)
def test_likelihood_gain_is_the_log_ratio_over_the_options(chances, gain):
    policy = Policy(chances)
    group = make_group([thought("a rib", "C"), "a rib", thought(""), thought("a rib"), thought("hm")])
    rewards = likelihood_gain(policy, split_common_prefix)(group)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == pytest.approx(
        [gain, 0, 0, gain, 0], abs=rounding(8, math.log(1e30) if abs(gain) == 1 else 5)
    )
    ((prompt, texts),) = policy.questions  # one question a group, each reasoning once
    assert prompt is group.prompt
    assert len(texts) == 3 * 4


def test_a_group_without_format_asks_nothing():
    policy = Policy([1.0, 1.0, 1.0, 1.0])
    assert likelihood_gain(policy, split_common_prefix)(make_group(["x", ""])).tolist() == [0, 0]
    assert policy.questions == []


@pytest.mark.parametrize(
    ("answers", "rewards"),
    [
        (["A", "A", "B", "A", "C"], [0.5, 0.5, 0, 0.5, 0]),
        (["A", "a", "x", "A) head", "A"], [0.25, 0, 0, 0, 0.25]),
        (["Z", "Z", "E", "E", "B"], [0, 0, 0, 0, 0]),  # letters of no option
        (["D", "D"], [1, 1]),
        (["D"], [0]),
    ],
)
def test_self_consistency_is_the_share_of_others_with_the_same_letter(answers, rewards):
    assert self_consistency_reward(make_group([thought("", answer) for answer in answers])).tolist() == rewards


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (thought("rib"), 1),
        (thought("rib " * 120), 1),
        (thought("rib, " * 180), 0.75),
        (thought("rib " * 240), 0.5),
        (thought("rib " * 360), 0),
        (thought("rib " * 2000), 0),
        (thought(""), 0),
        (thought(" ... \n"), 0),
        ("rib", 0),
    ],
)
def test_brevity(text, reward):
    assert brevity_reward(EXAMPLE, completion(text)) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (thought("one two three four"), 1),
        (thought("a b a b a"), 2 / 3),  # aba bab aba
        (thought("no, No. NO no no no"), 1 / 4),
        (thought("rib " * 102), 1 / 100),
        (thought("rib rib"), 1),
        (thought("rib"), 1),
        (thought(""), 0),
        ("one two three four", 0),
    ],
)
def test_repetition(text, reward):
    assert repetition_reward(EXAMPLE, completion(text)) == pytest.approx(reward)


def whole_rubric() -> Rubric:
    return Rubric.from_config(
        dict.fromkeys(NAMES, 1.0), likelihood=Policy([0.1, 0.7, 0.1, 0.1]), split_common_prefix=split_common_prefix
    )


@settings(deadline=None)
@given(st.lists(TEXTS | TEXTS.map(thought), min_size=1, max_size=4))
def test_every_reward_is_finite_and_in_its_range_for_any_text(texts):
    scored = whole_rubric().score(make_group(texts))
    assert set(scored.reward_parts) == set(NAMES)
    for name, rewards in scored.reward_parts.items():
        assert rewards.shape == (len(texts),)
        assert rewards.dtype == np.float32
        assert ((rewards >= (-1 if name == "likelihood_gain" else 0)) & (rewards <= 1)).all(), name


@given(TEXTS, st.lists(st.text(max_size=6), min_size=2, max_size=10, unique=True))
def test_what_is_argued_for_is_an_option_or_none(reasoning, options):
    assert argued_option(reasoning, options) in {None, *range(len(options))}


@pytest.mark.parametrize(
    "piece",
    ["left ", "knee", "knee or ", "not ", " ", "\n", "(", "option ", "B) ", "is ", "</think>", "肺", "the answer is "],
)
def test_a_hundred_thousand_characters_are_rewarded_at_once(piece):
    group = make_group([thought(piece * (100_000 // len(piece)))])
    rubric = Rubric.from_config({name: 1.0 for name in NAMES if name != "likelihood_gain"})
    call_within(60, lambda: rubric.score(group))  # something quadratic would take minutes
