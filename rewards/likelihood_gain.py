"""What the reasoning is worth to the policy itself: no written rationale is needed to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rewards.base import GroupReward, Likelihood, PartingIds
from rewards.parsing import reasoning_text
from rlmed.core.prefill import remaining
from rlmed.core.types import LETTERS, FloatArray, Prompt, RolloutGroup


def likelihood_gain(likelihood: Likelihood, parting_ids: PartingIds) -> GroupReward:
    """How much likelier the reasoning makes the right option; float32 [G] in [-1, 1].

    With l(o | r) the log-likelihood that the policy gives the letter of option o after
    `<think>r</think>\\n<answer>`, p(o | r) = softmax over the n options of l(o | r), and reasoning r:

        gain = (log p(right | r) - log p(right | "")) / log n, clipped to [-1, 1]

    1 is from chance to certainty, 0 is what empty reasoning earns, as does a completion without the format. Among the
    options only, because otherwise reasoning would be paid for making any letter likelier than other words.

    The policy is the learner's of now, at temperature 1. With `algo.max_staleness` above 0 it may be newer than the one that
    wrote the reasoning. The text is tokenized anew, which need not give the tokens that were sampled.

    All texts of a group are one question: the prompt, with its image, is computed once. Its price is that the n letters of
    a completion each repeat the reasoning. To share that instead would take a prompt, and a pass of the vision tower, per
    completion: with Qwen2-VL-2B a visual token costs as much as three of text, so for four options that is dearer unless
    reasoning is much longer than MedVLM-R1's.
    """

    def reward(group: RolloutGroup) -> FloatArray:
        example = group.prompt.example
        reasonings = [reasoning_text(completion.text) for completion in group.completions]
        # empty reasoning first; equal ones are asked for once
        different = list(dict.fromkeys(["", *(entry for entry in reasonings if entry is not None)]))
        if len(different) == 1:
            return np.zeros(len(reasonings), dtype=np.float32)
        chances = option_logprobs(group.prompt, different, likelihood, parting_ids)[:, example.answer]
        gains = np.clip((chances - chances[0]) / math.log(len(example.options)), -1.0, 1.0)
        gain_of = dict(zip(different, gains.tolist(), strict=True))
        return np.array([0.0 if entry is None else gain_of[entry] for entry in reasonings], dtype=np.float32)

    return reward


def option_logprobs(
    prompt: Prompt, reasonings: Sequence[str], likelihood: Likelihood, parting_ids: PartingIds
) -> npt.NDArray[np.float64]:
    """float64 [reasonings, options]: log p(option | prompt, reasoning), normalized over the options.

    What counts of a text are the tokens after those that the texts of all letters begin with.
    """
    letters = LETTERS[: len(prompt.example.options)]
    parted = [
        parting_ids([remaining(prompt.prefill, answered(reasoning, letter)) for letter in letters])
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
    """A completion up to its letter."""
    return f"<think>{reasoning}</think>\n<answer>{letter}"
