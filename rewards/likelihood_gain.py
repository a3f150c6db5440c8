"""Reward: how much the reasoning raises the policy's probability of the correct option."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rewards.base import GroupReward, Likelihood, SplitCommonPrefix
from rlmed.core.parsing import reasoning_text
from rlmed.core.prefill import remaining
from rlmed.core.types import LETTERS, FloatArray, Prompt, RolloutGroup


def likelihood_gain(likelihood: Likelihood, split_common_prefix: SplitCommonPrefix) -> GroupReward:
    """Reward how much likelier the reasoning makes the correct option; float32 [G] in [-1, 1].

    Let l(o | r) be the policy's log-likelihood of the letter of option o after
    `<think>r</think>\\n<answer>`, p(o | r) = softmax over the n options of l(o | r), and reasoning
    r:

        gain = (log p(correct | r) - log p(correct | "")) / log n, clipped to [-1, 1]

    1 means from chance to certainty. Empty reasoning earns 0, as does a completion that breaks the
    format. The softmax runs over the options only; otherwise reasoning would be paid for making any
    letter likelier than other words.

    The policy is the learner's current one, at temperature 1; with `algo.max_staleness` above 0 it
    may be newer than the one that wrote the reasoning. The text is retokenized, which may not
    reproduce the sampled tokens.

    All texts of a group share one prompt, computed once with its image; in return, each of a
    completion's n letters repeats the reasoning. Sharing the reasoning instead would take a prompt,
    and a pass of the vision tower, per completion: with Qwen2-VL-2B a visual token costs as much as
    three text tokens, so for four options that costs more unless reasoning is much longer than
    MedVLM-R1's.
    """

    def reward(group: RolloutGroup) -> FloatArray:
        example = group.prompt.example
        reasonings = [reasoning_text(completion.text) for completion in group.completions]
        # empty reasoning first; duplicates are scored once
        different = list(dict.fromkeys(["", *(entry for entry in reasonings if entry is not None)]))
        if len(different) == 1:
            return np.zeros(len(reasonings), dtype=np.float32)
        chances = option_logprobs(group.prompt, different, likelihood, split_common_prefix)[:, example.answer]
        gains = np.clip((chances - chances[0]) / math.log(len(example.options)), -1.0, 1.0)
        gain_of = dict(zip(different, gains.tolist(), strict=True))
        return np.array([0.0 if entry is None else gain_of[entry] for entry in reasonings], dtype=np.float32)

    return reward


def option_logprobs(
    prompt: Prompt, reasonings: Sequence[str], likelihood: Likelihood, split_common_prefix: SplitCommonPrefix
) -> npt.NDArray[np.float64]:
    """Return log p(option | prompt, reasoning), normalized by row; float64 [reasonings, options].

    Only the tokens after the prefix shared by the texts of all letters count.
    """
    letters = LETTERS[: len(prompt.example.options)]
    parted = [
        split_common_prefix([remaining(prompt.prefill, answered(reasoning, letter)) for letter in letters])
        for reasoning in reasonings
    ]
    texts = [np.concatenate([shared, ending]) for shared, endings in parted for ending in endings]
    counted = [len(ending) for _, endings in parted for ending in endings]
    (scored,) = likelihood([(prompt, texts)])
    totals = [entry[-count:].sum(dtype=np.float64) for entry, count in zip(scored, counted, strict=True)]
    table = np.array(totals).reshape(len(reasonings), len(letters))
    logprobs: npt.NDArray[np.float64] = table - np.logaddexp.reduce(table, axis=1, keepdims=True)
    return logprobs


def answered(reasoning: str, letter: str) -> str:
    """Return a completion up to its letter."""
    return f"<think>{reasoning}</think>\n<answer>{letter}"
