"""What a model believes of each option: the probability of its letter after a question and a reasoning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from learner.likelihood import Question, completion_logprobs
from rewards.parsing import ANSWER_CLOSING
from rlmed.core.calibration import Float64Array
from rlmed.core.prefill import remaining
from rlmed.core.types import LETTERS, Prompt
from rlmed.data.prompts import PromptRenderer
from rlmed.models.policy import Policy

AT_A_TIME = 64
"""Questions rendered and scored together: it bounds the memory of their pictures."""


def letter_probabilities(
    cases: Iterable[tuple[Prompt, str]], *, policy: Policy, renderer: PromptRenderer, token_budget: int
) -> Iterator[Float64Array]:
    """Probabilities of the option letters, each as the completion would end with it.

    The likelihood of `B</answer>` after prompt and text, for every letter of the question, scaled so that they sum to 1: the
    closing tag belongs to it, since "A" alone could also begin a word.

    Args:
        cases: prompts, each with the beginning of a completion of it, its prefill included, up to and including `<answer>`.
        policy: the weights.
        renderer: of the same model.
        token_budget: most tokens in a row, as `learner.token_budget`.

    Yields:
        float64 [options] for each case, in order.
    """
    waiting = iter(cases)
    while part := list(islice(waiting, AT_A_TIME)):
        questions = [_question(prompt, text, renderer) for prompt, text in part]
        for logprobs in completion_logprobs(policy, questions, token_budget=token_budget):
            yield _softmax([float(entry.astype(np.float64).sum()) for entry in logprobs])


def _question(prompt: Prompt, text: str, renderer: PromptRenderer) -> Question:
    letters = LETTERS[: len(prompt.example.options)]
    begun = remaining(prompt.prefill, text)
    shared, endings = renderer.parting_ids([f"{begun}{letter}{ANSWER_CLOSING}" for letter in letters])
    return dataclasses.replace(prompt, token_ids=np.concatenate([prompt.token_ids, shared])), endings


def _softmax(scores: Sequence[float]) -> Float64Array:
    weights = np.exp(np.array(scores) - max(scores))
    return weights / weights.sum()
