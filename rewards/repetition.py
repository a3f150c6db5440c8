"""Guard against reasoning that loops."""

from __future__ import annotations

from rlmed.core.parsing import reasoning_text, words
from rlmed.core.types import Completion, Example

NGRAM = 3


def repetition_reward(example: Example, completion: Completion) -> float:
    """Return 1 minus the share of repeated word trigrams in the reasoning: distinct ones over all.

    One or two words repeat nothing and earn 1. Empty reasoning earns 0, as does a completion that
    breaks the format.
    """
    found = words(reasoning_text(completion.text) or "")
    if len(found) < NGRAM:
        return float(bool(found))
    ngrams = list(zip(*(found[start:] for start in range(NGRAM)), strict=False))
    return len(set(ngrams)) / len(ngrams)
