"""Whether the answer is the one that the reasoning argues for."""

from __future__ import annotations

from rewards.argument import argued_option
from rewards.parsing import answer_text, option_letters, reasoning_text
from rlmed.core.types import LETTERS, Completion, Example

UNDECIDED = 0.5
"""For reasoning that argues for no option: it neither supports the answer nor speaks against it."""


def agreement_reward(example: Example, completion: Completion) -> float:
    """1 if the reasoning argues for the option that is answered, 0 if for another, `UNDECIDED` if for none.

    0 too without the format, without exactly one letter in the answer (read as the choice reward reads it), and for empty
    reasoning, which would otherwise be a safe way to half of the reward. The right answer is not looked at.
    """
    reasoning, answer = reasoning_text(completion.text), answer_text(completion.text)
    letters = option_letters(answer) if answer is not None else []
    if not reasoning or len(letters) != 1:
        return 0.0
    argued = argued_option(reasoning, example.options)
    return UNDECIDED if argued is None else float(LETTERS[argued] == letters[0])
