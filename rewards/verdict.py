"""Read the mark that a judge gives in its reply."""

from __future__ import annotations

import json
import math
import re
from typing import Any

LONGEST = 20_000
"""Characters at a reply's end that are read."""
_BRACES = 100
"""Most braces that a reply with JSON may open."""
_NAMES = ("score", "mark", "rating", "grade", "verdict", "judgement", "judgment", "correct", "result", "answer")
_NUMBER = r"(-?\d+(?:\.\d+)?)(?!\d|\.\d|\s*%)(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?"
_LABELLED = re.compile(
    r"(?P<final>\bfinal[*_\s]{1,4})?\b(?:score|mark|rating|grade|verdict|judge?ment)\b[\"'*_\s:=]{0,8}(?:(?:is|(?P<of>of))\b)?"
    r"[\"'*_\s:=(\[]{0,8}(?P<number>" + _NUMBER + r")(?!\s*(?:[-–]|to\b)\s*\d)",
    re.IGNORECASE,
)
_MARKED = re.compile(r"(?:\\boxed\{|\[\[)\s*(?P<number>" + _NUMBER + ")")
_ANY_NUMBER = re.compile(r"(?<![\w.])" + _NUMBER)
_SCALE = re.compile(r"\(\s*-?\d+(?:\.\d+)?\s*(?:[-–]|to)\s*-?\d+(?:\.\d+)?\s*\)")
"""The scale in brackets, as in "Score (0-10): 7"."""
_VERDICT = re.compile(
    r"(?:verdict |judge?ment |result )?(?P<first>yes|no|true|false)?"
    r"(?: ?(?:(?:it|this|that|the answer) )?(?:is )?(?P<second>(?:not |isnt )?correct|incorrect|wrong))?"
)
"""All that a verdict in words may consist of, without punctuation."""
_GOOD = ("correct", "true", "yes")


def read_mark(reply: str, low: float, high: float) -> float | None:
    r"""Return the mark in a reply, between `low` and `high`; None without a clear one.

    The first of these that is there: the last JSON object with a score, its own before those of
    objects in it; the number behind a word such as "score" or in `\boxed{}`; one number alone ("7",
    "7/10"); a verdict such as "Correct." or "No, that is wrong." that is the whole reply. Several
    labelled numbers that differ are no clear mark, unless one is called final. What a model thinks
    aloud in `<think>` tags does not count, nor does a number outside of the scale, or out of
    another one ("4/5" for a scale to 10).

    Example:
        >>> [read_mark(reply, 0, 10) for reply in ('{"score": 7}', "Score: 7/10", "Incorrect.", "70", "good")]
        [7.0, 7.0, 0.0, None, None]
    """
    text = reply.rpartition("</think>")[2].partition("<think>")[0].rstrip()[-LONGEST:]
    if text.count("{") > _BRACES:
        return None
    for content in reversed(_outermost(text)):
        if values := _scores(content):
            marks = {_in_scale(value, low, high) for value in values}
            return marks.pop() if len(marks) == 1 else None
    text = _SCALE.sub(" ", text)
    labelled = list(_LABELLED.finditer(text))
    found = [one for one in labelled if one["final"]] or [*labelled, *_MARKED.finditer(text)]
    numbers = list(_ANY_NUMBER.finditer(text))
    if found:
        # "a score of 10" may be what another answer would get: no other number may stand beside it
        alone = all(one.re is _LABELLED and one["of"] for one in found)
        said = [match for one in found if (match := re.match(_NUMBER, one["number"], re.IGNORECASE))]
        marks = {_number(one, low, high) for one in (numbers if alone else said)}
        return marks.pop() if len(marks) == 1 else None
    if len(numbers) == 1:
        return _number(numbers[0], low, high)
    return None if numbers else _from_words(text, low, high)


def _outermost(text: str) -> list[dict[str, Any]]:
    """Return a text's JSON objects that are in no other, in order; none if the last is cut off."""
    decoder, objects, start = json.JSONDecoder(), [], text.find("{")
    while start >= 0:
        end = start + 1
        try:
            content, end = decoder.raw_decode(text, start)
            objects.append(content)
        except json.JSONDecodeError as error:
            if error.pos >= len(text) or error.msg.startswith("Unterminated"):
                return []
        except (ValueError, RecursionError):
            pass
        start = text.find("{", end)
    return objects


def _scores(content: dict[str, Any]) -> list[Any]:
    """Return an object's score; without one, the scores of the objects in it."""
    named = {str(key).lower(): value for key, value in content.items()}
    for name in _NAMES:
        if name in named and not isinstance(named[name], dict):
            return [named[name]]
    return [value for inner in content.values() if isinstance(inner, dict) for value in _scores(inner)]


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
    plain = " ".join(re.sub(r"[\W_]+", " ", re.sub(r"['’]", "", text.lower())).split())
    found = _VERDICT.fullmatch(plain)
    said = {word in _GOOD for word in found.groups() if word} if found else set()
    return float(high if said.pop() else low) if len(said) == 1 else None
