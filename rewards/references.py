"""What texts a reward compares: an answer, and the right ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rlmed.core.parsing import answer_text
from rlmed.core.prefill import TAGS
from rlmed.core.types import LETTERS, Completion, Example

_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")


def said(completion: Completion) -> str:
    """Return the text of a completion's answer, without tags that stand in it; "" without one."""
    answer = answer_text(completion.text) or ""
    for tag in TAGS:
        answer = answer.replace(tag, " ")
    return answer.strip()


def without_answer(example: Example, completion: Completion) -> float | None:
    """Return 0 for a completion without an answer, which needs no call; else None."""
    return None if said(completion) else 0.0


def answered(example: Example, completion: Completion) -> str:
    """Return the text of a completion's answer; the option's for a letter alone.

    Example:
        >>> example = Example("mri-7", None, "Which part?", ("head", "knee"), 1)
        >>> answered(example, Completion([7], [-0.5], "<answer>B</answer>", "stop"))
        'knee'
    """
    answer = said(completion)
    if example.is_choice and (found := _LETTER.fullmatch(answer)):
        index = LETTERS.find(found[1].upper())
        if 0 <= index < len(example.options):
            return example.options[index]
    return answer


def references_of(example: Example) -> list[str]:
    """Return the right texts: an option's, accepted answers, or references; empty without any.

    Example:
        >>> references_of(Example("mri-7", None, "Which part?", ("head", "knee"), 1))
        ['knee']
    """
    if example.is_choice:
        return [example.options[example.answer]]
    truth = example.truth
    if isinstance(truth, Mapping):
        truth = truth.get("answers") or truth.get("references")
    texts = [truth] if isinstance(truth, str) else truth
    whole = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
    return list(texts) if whole else []
