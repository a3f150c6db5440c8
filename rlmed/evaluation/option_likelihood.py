"""Score the options: the probability of each letter after a question and its reasoning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from learner.likelihood import ScoringRequest, completion_logprobs
from rlmed.core.calibration import Float64Array
from rlmed.core.prefill import ANSWER, ANSWER_END, remaining
from rlmed.core.types import LETTERS, Prompt
from rlmed.data.prompts import PromptRenderer
from rlmed.models.policy import Policy

AT_A_TIME = 64
"""Questions rendered and scored together; bounds the memory of their pictures."""


def letter_probabilities(
    cases: Iterable[tuple[Prompt, str]], *, policy: Policy, renderer: PromptRenderer, token_budget: int
) -> Iterator[Float64Array]:
    """Yield the probabilities of the option letters as endings of each completion.

    This is the likelihood of, for example, `B</answer>` after prompt and text, normalized over the
    question's letters. The closing tag is included, since "A" alone could also begin a word.

    Args:
        cases: prompts, each with the beginning of its completion, including prefill, up to and
            including `<answer>`.
        policy: the model.
        renderer: prompt renderer of the same model.
        token_budget: most tokens in a packed row, as in `learner.token_budget`.

    Yields:
        float64 [options] for each case, in order.
    """
    waiting = iter(cases)
    while part := list(islice(waiting, AT_A_TIME)):
        requests = [_scoring_request(prompt, text, renderer) for prompt, text in part]
        for logprobs in completion_logprobs(policy, requests, token_budget=token_budget):
            yield _softmax([float(entry.astype(np.float64).sum()) for entry in logprobs])


def answer_opening(completion: str) -> str | None:
    """Return a completion up to and including its first answer tag; None without one."""
    reasoning, tag, _ = completion.partition(ANSWER)
    return reasoning + tag if tag else None


def _scoring_request(prompt: Prompt, text: str, renderer: PromptRenderer) -> ScoringRequest:
    letters = LETTERS[: len(prompt.example.options)]
    begun = remaining(prompt.prefill, text)
    shared, endings = renderer.split_common_prefix([f"{begun}{letter}{ANSWER_END}" for letter in letters])
    return dataclasses.replace(prompt, token_ids=np.concatenate([prompt.token_ids, shared])), endings


def _softmax(scores: Sequence[float]) -> Float64Array:
    weights = np.exp(np.array(scores) - max(scores))
    probabilities: Float64Array = weights / weights.sum()
    return probabilities
