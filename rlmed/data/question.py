"""Write a question and its options as prompt text."""

from __future__ import annotations

from rlmed.core.types import LETTERS, Example


def question_text(example: Example) -> str:
    r"""Return the question, then one line per option.

    Example:
        >>> question_text(Example(id="1", image=None, question="Which?", options=("head", "knee"), answer=0))
        'Which?\nA) head\nB) knee'
    """
    lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, example.options, strict=False)]
    return "\n".join([example.question, *lines])
