"""Accuracy reward of MedVLM-R1 (arXiv 2502.19634)."""

from __future__ import annotations

from rlmed.core.parsing import answer_text, option_letters
from rlmed.core.types import Completion, Example


def choice_reward(example: Example, completion: Completion) -> float:
    """Return 1 for the correct letter alone in the answer tags, 0.5 among other text, else 0.

    Exactly one letter may occur, counted in the upper-cased text: "B) liver" holds B, I and E and
    earns nothing.

    Example:
        >>> import numpy as np
        >>> example = Example("ct-7", None, "Which organ?", ("liver", "spleen"), answer=1)
        >>> texts = ("<answer>B</answer>", "<answer>(b)</answer>", "<answer>A</answer>")
        >>> completions = [Completion(np.arange(2), np.zeros(2, np.float32), text, "stop") for text in texts]
        >>> [choice_reward(example, completion) for completion in completions]
        [1.0, 0.5, 0.0]
    """
    answer = answer_text(completion.text)
    if answer is None or option_letters(answer) != [example.letter]:
        return 0.0
    return 1.0 if answer.upper() == example.letter else 0.5
