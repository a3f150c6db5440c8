"""Read the mark that a judge gives in its reply."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

LONGEST = 20_000
"""Characters at a reply's end that are read."""
_BRACES = 100
"""Most places where a JSON object is looked for, from the end."""
_NAMES = ("score", "mark", "rating", "grade", "verdict", "judgement", "judgment", "correct", "result", "answer")
_NUMBER = r"(-?\d+(?:\.\d+)?)(?!\d|\.\d|\s*%)(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?"
_LABELLED = re.compile(
    r"\b(?:score|mark|rating|grade|verdict|judge?ment)\b[\"'*_\s:=]{0,8}(?:(?:is|of)\b)?[\"'*_\s:=(\[]{0,8}" + _NUMBER,
    re.IGNORECASE,
)
_MARKED = re.compile(r"(?:\\boxed\{|\[\[)\s*" + _NUMBER)
_ANY_NUMBER = re.compile(r"(?<![\w.])" + _NUMBER)
_WORD = re.compile(r"\b(?:(not|isn['’]t|in)[ -]?)?(correct|right|true|yes|wrong|false|no)\b", re.IGNORECASE)
_GOOD = ("correct", "right", "true", "yes")


def read_mark(reply: str, low: float, high: float) -> float | None:
    r"""Return the mark in a reply, between `low` and `high`; None without a clear one.

    The first of these that is there: the last JSON object with a score; the last number behind a
    word such as "score" or in `\boxed{}`; one number alone ("7", "7/10"); words such as "correct"
    or "no", if all say the same. What a model thinks aloud in `<think>` tags does not count, nor
    does a number outside of the scale, or out of another one ("4/5" for a scale to 10).

    Example:
        >>> [read_mark(reply, 0, 10) for reply in ('{"score": 7}', "Score: 7/10", "Incorrect.", "70", "good")]
        [7.0, 7.0, 0.0, None, None]
    """
    text = reply.rpartition("</think>")[2].partition("<think>")[0][-LONGEST:]
    for value in _from_json(text):
        return _in_scale(value, low, high)
    for pattern in (_LABELLED, _MARKED):
        if found := list(pattern.finditer(text)):
            return _number(found[-1], low, high)
    numbers = list(_ANY_NUMBER.finditer(text))
    if len(numbers) == 1:
        return _number(numbers[0], low, high)
    return None if numbers else _from_words(text, low, high)


def _from_json(text: str) -> Iterator[Any]:
    """Yield the scores of the JSON objects in a text, the last first."""
    decoder = json.JSONDecoder()
    for start in [found.start() for found in re.finditer(r"\{", text)][-_BRACES:][::-1]:
        try:
            content, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        named = {str(key).lower(): value for key, value in content.items()}
        yield from (named[name] for name in _NAMES if name in named)


def _in_scale(value: Any, low: float, high: float) -> float | None:
    """Return a value of JSON as a mark."""
    if isinstance(value, bool):
        return float(high if value else low)
    if isinstance(value, str):
        numbers = list(_ANY_NUMBER.finditer(value))
        if len(numbers) == 1:
            return _number(numbers[0], low, high)
        return None if numbers else _from_words(value, low, high)
    if isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high:
        return float(value)
    return None


def _number(found: re.Match[str], low: float, high: float) -> float | None:
    """Return a number, out of a best one if that is given, as a mark."""
    if found[2] is not None and float(found[2]) != high:
        return None
    return _in_scale(float(found[1]), low, high)


def _from_words(text: str, low: float, high: float) -> float | None:
    said = {(word.lower() in _GOOD) != bool(negation) for negation, word in _WORD.findall(text)}
    return float(high if said.pop() else low) if len(said) == 1 else None
