"""Reward an answer that agrees with its reasoning."""

from __future__ import annotations

from rewards.conclusion import argued_option
from rlmed.core.parsing import answer_text, option_letters, reasoning_text
from rlmed.core.types import LETTERS, Completion, Example

UNDECIDED = 0.5
"""Reward of reasoning that argues for no option: it neither supports nor contradicts the answer."""


def reasoning_consistency_reward(example: Example, completion: Completion) -> float:
    """Return 1 if the reasoning argues for the answered option, 0 if for another, else `UNDECIDED`.

    Also 0 for a broken format, for an answer without exactly one letter (read as the choice reward
    reads it), and for empty reasoning, which would otherwise earn half of the reward for free.
    Ignores the correct answer.
    """
    reasoning, answer = reasoning_text(completion.text), answer_text(completion.text)
    letters = option_letters(answer) if answer is not None else []
    if not reasoning or len(letters) != 1:
        return 0.0
    argued = argued_option(reasoning, example.options)
    return UNDECIDED if argued is None else float(LETTERS[argued] == letters[0])
