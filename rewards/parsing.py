"""Reading a completion: one place that knows `<think>…</think><answer>B</answer>`.

Everything here takes time in proportion to the length of the text, whatever a model writes: the obvious patterns with two
`.*?` search a completion of repeated tags again from each of them.
"""

from __future__ import annotations

import re

from rlmed.core.prefill import ANSWER as ANSWER_OPENING
from rlmed.core.prefill import ANSWER_END as ANSWER_CLOSING
from rlmed.core.prefill import THINK as _OPENING
from rlmed.core.types import LETTERS

_NO_REASONING = re.compile(r"(<think>\s*)?</think>")
_MIDDLE = re.compile(r"</think>\s*<answer>")
_WORD = re.compile(r"\w+")
_EVALUATED = re.compile(r"<answer>\s*([A-Z])\s*</answer>")


def has_format(text: str) -> bool:
    r"""True when the whole text is a reasoning in think tags followed by an answer in answer tags.

    It is True exactly where `<think>.*?</think>\s*<answer>.*?</answer>` matches the whole text, with a dot that matches
    newlines (MedVLM-R1, arXiv 2502.19634): since `.*?` takes anything and none of the tags can overlap, the two ends and
    one middle decide.
    """
    if not (text.startswith(_OPENING) and text.endswith(ANSWER_CLOSING)):
        return False
    return _MIDDLE.search(text) is not None


def has_answer_format(text: str) -> bool:
    """True when the whole text is one answer in answer tags, white space and an empty reasoning before it aside.

    The empty reasoning, or its closing tag alone, is what chat templates write that switch reasoning off.
    """
    text = text.strip()
    if empty := _NO_REASONING.match(text):
        text = text[empty.end() :].lstrip()
    ends = text.startswith(ANSWER_OPENING) and text.endswith(ANSWER_CLOSING)
    return ends and text.count(ANSWER_OPENING) == text.count(ANSWER_CLOSING) == 1


def reasoning_text(text: str) -> str | None:
    """What stands between the opening think tag and the first closing one that an answer follows, stripped.

    None where the text lacks the format: there is no telling then where the reasoning ends.
    """
    middle = _MIDDLE.search(text) if has_format(text) else None
    return text[len(_OPENING) : middle.start()].strip() if middle else None


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case. (A script without spaces has few and long ones.)"""
    return _WORD.findall(text.lower())


def answer_text(text: str) -> str | None:
    """What stands inside the first pair of answer tags, stripped; None without such a pair."""
    _, opening, rest = text.partition(ANSWER_OPENING)
    answer, closing, _ = rest.partition(ANSWER_CLOSING)
    return answer.strip() if opening and closing else None


def option_letters(answer: str) -> list[str]:
    """The letters A to J in the upper-cased text, in order, repetitions included."""
    return [letter for letter in answer.upper() if letter in LETTERS]


def evaluated_letter(text: str) -> str | None:
    """The letter that evaluation counts: alone inside the first answer tags that hold a single capital letter."""
    found = _EVALUATED.search(text)
    return found[1] if found else None
