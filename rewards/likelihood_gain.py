"""What the reasoning is worth to the policy itself: no written rationale is needed to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rewards.base import GroupReward, Likelihood, Tokenize
from rewards.parsing import reasoning_text
from rlmed.core.types import LETTERS, FloatArray, IntArray, Prompt, RolloutGroup


def likelihood_gain(likelihood: Likelihood, tokenize: Tokenize) -> GroupReward:
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
        chances = option_logprobs(group.prompt, different, likelihood, tokenize)[:, example.answer]
        gains = np.clip((chances - chances[0]) / math.log(len(example.options)), -1.0, 1.0)
        gain_of = dict(zip(different, gains.tolist(), strict=True))
        return np.array([0.0 if entry is None else gain_of[entry] for entry in reasonings], dtype=np.float32)

    return reward


def option_logprobs(
    prompt: Prompt, reasonings: Sequence[str], likelihood: Likelihood, tokenize: Tokenize
) -> npt.NDArray[np.float64]:
    """float64 [reasonings, options]: log p(option | prompt, reasoning), normalized over the options.

    Tokenizers merge across characters (for Qwen2 ">B" is one piece), so the texts of all letters are tokenized whole, and
    what counts is the tokens after those that all of them begin with.
    """
    letters = LETTERS[: len(prompt.example.options)]
    texts = [[tokenize(answered(reasoning, letter)) for letter in letters] for reasoning in reasonings]
    (scored,) = likelihood([(prompt, [token_ids for row in texts for token_ids in row])])
    totals = np.empty((len(texts), len(letters)))
    for i, row in enumerate(texts):
        start = shared_length(row)
        for j in range(len(letters)):
            totals[i, j] = scored[i * len(letters) + j][start:].sum(dtype=np.float64)
    logprobs: npt.NDArray[np.float64] = totals - np.logaddexp.reduce(totals, axis=1, keepdims=True)
    return logprobs


def answered(reasoning: str, letter: str) -> str:
    """A completion up to its letter."""
    return f"<think>{reasoning}</think>\n<answer>{letter}"


def shared_length(texts: Sequence[IntArray]) -> int:
    """Number of tokens that all texts begin with."""
    length = min(map(len, texts))
    same = np.stack([token_ids[:length] for token_ids in texts]) == texts[0][:length]
    return int(np.append(same.all(axis=0), False).argmin())
