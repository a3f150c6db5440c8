"""Guard against padded, overlong reasoning."""

from __future__ import annotations

from rlmed.core.parsing import reasoning_text, words
from rlmed.core.types import Completion, Example

FULL_WORDS, NO_WORDS = 120, 360
"""Words up to which brevity is 1, from which 0: about 160 and 480 of MedVLM-R1's 512 tokens."""


def brevity_reward(example: Example, completion: Completion) -> float:
    """Return 1 up to `FULL_WORDS` words of reasoning, falling linearly to 0 at `NO_WORDS`.

    Empty reasoning earns 0, since it would be the briefest; so does a completion that breaks the
    format.
    """
    count = len(words(reasoning_text(completion.text) or ""))
    return min(1.0, max(0.0, (NO_WORDS - count) / (NO_WORDS - FULL_WORDS))) if count else 0.0
