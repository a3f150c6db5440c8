"""Reading a completion: one place that knows `<think>…</think><answer>B</answer>`."""

from __future__ import annotations

import re

from rlmed.core.types import LETTERS

_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_EVALUATED = re.compile(r"<answer>\s*([A-Z])\s*</answer>")


def has_format(text: str) -> bool:
    """True when the whole completion is a reasoning in think tags followed by an answer in answer tags."""
    return _FORMAT.fullmatch(text) is not None


def answer_text(text: str) -> str | None:
    """What stands inside the first pair of answer tags, stripped; None without such a pair."""
    found = _ANSWER.search(text)
    return found[1].strip() if found else None


def option_letters(answer: str) -> list[str]:
    """The letters A to J in the upper-cased text, in order, repetitions included."""
    return [letter for letter in answer.upper() if letter in LETTERS]


def evaluated_letter(text: str) -> str | None:
    """The letter that evaluation counts: alone inside the first answer tags that hold a single capital letter."""
    found = _EVALUATED.search(text)
    return found[1] if found else None
