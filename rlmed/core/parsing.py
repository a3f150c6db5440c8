"""Parse completions: the only module that knows `<think>…</think><answer>B</answer>`.

Everything here takes linear time, whatever a model writes; the obvious patterns with two `.*?`
rescan a completion of repeated tags from each of them.
"""

from __future__ import annotations

import re

from rlmed.core.prefill import ANSWER, ANSWER_END, TAGS
from rlmed.core.prefill import THINK as _OPENING
from rlmed.core.types import LETTERS

_NO_REASONING = re.compile(r"(<think>\s*)?</think>")
_MIDDLE = re.compile(r"</think>\s*<answer>")
_WORD = re.compile(r"\w+")
_EVALUATED = re.compile(r"<answer>\s*([A-Z])\s*</answer>")


def has_format(text: str) -> bool:
    r"""Return whether the whole text is reasoning in think tags, then an answer in answer tags.

    Equivalent to a full match of `<think>.*?</think>\s*<answer>.*?</answer>`, the dot matching
    newlines (MedVLM-R1, arXiv 2502.19634): `.*?` takes anything and no tags can overlap, so
    checking both ends and one middle is enough.

    Example:
        >>> has_format("<think>dark</think> <answer>B</answer>"), has_format("dark, so B")
        (True, False)
    """
    if not (text.startswith(_OPENING) and text.endswith(ANSWER_END)):
        return False
    return _MIDDLE.search(text) is not None


def format_parts(text: str) -> int:
    r"""Count, from 0 to 5, the parts of the format that a text has, see `has_format`.

    One for each tag that follows the tags counted before it, which are those that occur exactly
    once; five for the whole format.

    Example:
        >>> [format_parts(text) for text in ("<think>dark</think><answer>B</answer>", "<think>dark", "dark, so B")]
        [5, 1, 0]
    """
    if has_format(text):
        return 5
    found, place = 0, 0
    for tag in TAGS:
        if text.count(tag) == 1 and (at := text.find(tag, place)) >= 0:
            found, place = found + 1, at + len(tag)
    return found


def has_answer_format(text: str) -> bool:
    """Return whether the whole text is one tagged answer, ignoring white space and empty reasoning.

    Chat templates that switch reasoning off write empty reasoning, or its closing tag alone.
    """
    text = text.strip()
    if empty := _NO_REASONING.match(text):
        text = text[empty.end() :].lstrip()
    ends = text.startswith(ANSWER) and text.endswith(ANSWER_END)
    return ends and text.count(ANSWER) == text.count(ANSWER_END) == 1


def reasoning_text(text: str) -> str | None:
    """Return the stripped text from opening think tag to the first closing one before an answer.

    None if the text breaks the format, since where the reasoning ends is then unknown.

    Example:
        >>> reasoning_text("<think> dark </think><answer>B</answer>")
        'dark'
    """
    middle = _MIDDLE.search(text) if has_format(text) else None
    return text[len(_OPENING) : middle.start()].strip() if middle else None


def words(text: str) -> list[str]:
    """Return runs of letters, digits and underscores, in lower case.

    (A script without spaces has few, long ones.)
    """
    return _WORD.findall(text.lower())


def answer_text(text: str) -> str | None:
    """Return the text inside the first pair of answer tags, stripped; None without such a pair.

    Example:
        >>> answer_text("It is <answer> B </answer>, not <answer>C</answer>")
        'B'
    """
    _, opening, rest = text.partition(ANSWER)
    answer, closing, _ = rest.partition(ANSWER_END)
    return answer.strip() if opening and closing else None


def option_letters(answer: str) -> list[str]:
    """Return the letters A to J in the upper-cased text, in order, repetitions included.

    Example:
        >>> option_letters("(b)"), option_letters("B) liver")
        (['B'], ['B', 'I', 'E'])
    """
    return [letter for letter in answer.upper() if letter in LETTERS]


def evaluated_letter(text: str) -> str | None:
    """Return the letter that evaluation counts: of the first answer tags with one capital alone.

    Example:
        >>> evaluated_letter("<answer> B </answer>"), evaluated_letter("<answer>b</answer>")
        ('B', None)
    """
    found = _EVALUATED.search(text)
    return found[1] if found else None
