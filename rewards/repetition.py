"""A guard against loops: reasoning that says the same again and again."""

from __future__ import annotations

from rewards.parsing import reasoning_text, words
from rlmed.core.types import Completion, Example

NGRAM = 3


def repetition_reward(example: Example, completion: Completion) -> float:
    """1 - share of repeated word trigrams in the reasoning: the number of different trigrams by the number of trigrams.

    One or two words repeat nothing and earn 1. Reasoning without a word earns 0, as does a completion without the format.
    """
    found = words(reasoning_text(completion.text) or "")
    if len(found) < NGRAM:
        return float(bool(found))
    ngrams = list(zip(*(found[start:] for start in range(NGRAM)), strict=False))
    return len(set(ngrams)) / len(ngrams)
