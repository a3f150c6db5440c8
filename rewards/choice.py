"""The accuracy reward of MedVLM-R1 (arXiv 2502.19634)."""

from __future__ import annotations

from rewards.parsing import answer_text, option_letters
from rlmed.core.types import Completion, Example


def choice_reward(example: Example, completion: Completion) -> float:
    """1 for the right letter alone in the answer tags, 0.5 for the right letter among other text, else 0.

    Letters are counted in the upper-cased text, so "B) liver" holds the letters B, I and E and earns nothing: exactly one
    letter may occur.
    """
    answer = answer_text(completion.text)
    if answer is None or option_letters(answer) != [example.letter]:
        return 0.0
    return 1.0 if answer.upper() == example.letter else 0.5
