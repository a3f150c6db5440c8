"""Parse letters and numbers that label option texts: `A. liver`, `(B) spleen`, `3) kidney`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlmed.core.types import LETTERS

_LETTER, _NUMBER = "[A-Ja-jＡ-Ｊａ-ｊ]", "(?:10|１０|0?[0-9]|[０-９])"
_OPEN, _CLOSE = r"[(\[{<（［【〔]", r"[)\]}>）］】〕]"
_WORD = r"(?:(?:option|choice|answer)\s{1,3})?"
_KEY = rf"(?:{_LETTER}|{_NUMBER})"
_LIST = rf"{_LETTER}(?:\s{{0,3}}[、,，-]\s{{0,3}}{_LETTER})*\s*$"
_SURE = re.compile(
    rf"{_WORD}(?:{_OPEN}\s{{0,3}}(?P<enclosed>{_KEY})\s{{0,3}}{_CLOSE}\s{{0,3}}[.:：．]?"  # (A) x
    rf"|(?P<closed>{_KEY})\s{{0,3}}\.?\s{{0,3}}{_CLOSE}"  # A) x
    rf"|(?P<colon>{_LETTER})\s{{0,3}}[:：])\s*(?P<rest>\S.*)",  # A: x
    re.IGNORECASE | re.DOTALL,
)
_LIKELY = re.compile(
    rf"{_WORD}(?:(?P<stop>{_LETTER})(?:\s{{0,3}}[.．。]|/(?=\s))"  # A. x, A/ x
    rf"|(?P<listed>{_KEY})\s{{0,3}}、(?!\s{{0,3}}{_LIST})"  # A、x, but A、B are two letters
    rf"|(?P<dash>{_LETTER})(?:\s{{1,3}}[-–—]|\s{{0,3}}[-–—](?=\s))(?!\s{{0,3}}{_LIST})"  # A - x, not B-mode
    rf"|(?P<tab>{_KEY})\t"
    # 1. x, but 1.5 cm and 1:2 are numbers
    rf"|(?P<number>{_NUMBER})(?:\.(?=\s)|\s{{0,3}}．|:(?=\s+\D)))\s*(?P<rest>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_BARE = re.compile(
    rf"(?:(?:option|choice|answer)[\s:]{{1,3}})?{_OPEN}?\s{{0,3}}(?P<key>{_KEY})\s{{0,3}}\.?\s{{0,3}}(?:{_CLOSE}|[.:：．、])?",
    re.IGNORECASE,
)
_MARKED = re.compile(r"(?P<mark>\*\*|__|[*_`\"'])(?P<head>[^*_`\"']{1,12})(?P=mark)(?P<rest>.*)", re.DOTALL)
_WHOLLY_MARKED = re.compile(r"(?P<mark>\*\*|__)(?P<text>[^*]+)(?P=mark)", re.DOTALL)
_BULLET = re.compile(r"[-–—•·*]\s+(?P<rest>\S.*)", re.DOTALL)
_ALPHABETS = (
    ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"),
    tuple("АБВГДЕЖЗИК"),
    tuple("ΑΒΓΔΕΖΗΘΙΚ"),
    tuple("甲乙丙丁戊己庚辛壬癸"),
    tuple("가나다라마바사아자차"),
)
"""Enumerations besides letters and numbers."""
_COUNTED = tuple(
    (
        alphabet,
        re.compile(
            rf"{_OPEN}?\s{{0,3}}(?P<key>{'|'.join(sorted(alphabet, key=len, reverse=True))})\s{{0,3}}"
            rf"(?:{_CLOSE}[.:：．]?|[.:：．、])\s*(?P<rest>\S.*)",
            re.IGNORECASE | re.DOTALL,
        ),
    )
    for alphabet in _ALPHABETS
)
"""Each enumeration, and the pattern of a text that begins with one of its marks."""
_NAMED = re.compile(
    rf"(?:(?:options?|choices?|answers?|opt?|ans)[\s_.-]*)?(?P<key>{_LETTER}|[0-9]{{1,2}})", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Label:
    """A text's own leading letter or number, and the rest.

    Example:
        >>> own_label("(b) spleen")
        Label(name='B', rest='spleen', sure=True)
    """

    name: str
    """"A" to "J", or a number without leading zeros."""
    rest: str
    """The text after it."""
    sure: bool
    """False if the beginning may not be a label: `E. coli` and `B - lymphocytes` begin like one."""


def own_label(text: str) -> Label | None:
    """Return the text's label; None without one."""
    for written in _unadorned(text):
        for pattern in (_SURE, _LIKELY):
            found = pattern.match(written)
            if found:
                key = next(value for name, value in found.groupdict().items() if value and name != "rest")
                return Label(_plain(key), found["rest"].strip(), pattern is _SURE)
    return None


def _unadorned(text: str) -> Iterator[str]:
    """Yield a text as is, and without marks at its start: `**A.** x`, `"A": x`, `• A. x`, `Ⓐ x`."""
    text = text.strip()
    yield text
    listed = _BULLET.match(text)
    if listed:
        yield listed["rest"]
    for base in (text, listed["rest"]) if listed else (text,):
        if marked := _WHOLLY_MARKED.fullmatch(base):
            yield marked["text"]
        if marked := _MARKED.match(base):
            yield marked["head"] + marked["rest"]
        # superscripts and subscripts belong to the text: ¹H
        if unicodedata.category(base[:1] or " ") in ("No", "So") and "<su" not in unicodedata.decomposition(base[0]):
            inside = unicodedata.normalize("NFKC", base[0]).strip("().")
            yield f"({inside}) {base[1:]}".strip()


def own_labels(texts: Sequence[str]) -> tuple[Label | None, ...]:
    """Return each text's label or None; empty if fewer than two have one or two are alike.

    Also empty if two texts would be alike without them, as `1. rib` and `2. rib`, unless the labels
    are A, B, C and so on.

    Example:
        >>> [label.rest for label in own_labels(["A. liver", "B. spleen"]) if label], own_labels(["A. carotis", "A. radialis"])
        (['liver', 'spleen'], ())
    """
    counted, _ = _series(texts)
    if counted:
        return counted
    labels = tuple(own_label(text) for text in texts)
    found = [label for label in labels if label]
    names, rests = {label.name for label in found}, {label.rest.casefold() for label in found}
    if len(found) < 2 or len(names) < len(found) or len({name.isdigit() for name in names}) != 1:
        return ()
    lettered = not next(iter(names)).isdigit() and are_a_series(sorted(names))
    return labels if lettered or len(rests) == len(found) else ()


def _series(texts: Sequence[str]) -> tuple[tuple[Label, ...], tuple[str, ...]]:
    """Return numbered labels, and their enumeration, if all have one: `I. liver`, `II. spleen`."""
    for alphabet, pattern in _COUNTED:
        found = [match for text in texts if (match := pattern.match(text.strip()))]
        numbers = [alphabet.index(match["key"].upper()) + 1 for match in found]
        if len(texts) > 1 and sorted(numbers) == list(range(1, len(texts) + 1)):
            pairs = zip(numbers, found, strict=True)
            return tuple(Label(str(number), match["rest"].strip(), sure=True) for number, match in pairs), alphabet
    return (), ()


def name_in_series(texts: Sequence[str], answer: str) -> str | None:
    """Return an answer's number if the options are enumerated its way: `II` is 2; else None.

    Example:
        >>> name_in_series(["I. liver", "II. spleen"], "ii)"), name_in_series(["liver", "spleen"], "II")
        ('2', None)
    """
    _, alphabet = _series(texts)
    key = answer.strip().strip("()[].:").strip().upper()
    return str(alphabet.index(key) + 1) if key in alphabet else None


def are_a_series(names: Sequence[str]) -> bool:
    """Return whether names are A, B, C … or 1, 2, 3 … or 0, 1, 2 …, in any order."""
    if all(name.isdigit() for name in names):
        numbers = sorted(int(name) for name in names)
        return numbers in (list(range(len(names))), list(range(1, len(names) + 1)))
    return sorted(names) == list(LETTERS[: len(names)])


def bare_name(answer: str) -> str | None:
    """Return an answer's letter or number, undecorated: B for `(b)` and `Option B`; else None."""
    found = next(filter(None, map(_BARE.fullmatch, _unadorned(answer))), None)
    return _plain(found["key"]) if found else None


def key_name(key: str) -> str:
    """Return the letter or number of a key or column: `option_a` is A, `01` is 1; others as is."""
    text = unicodedata.normalize("NFKC", key).strip().strip("()[]{}.:")
    found = _NAMED.fullmatch(text)
    return _plain(found["key"]) if found else text.casefold()


def _plain(key: str) -> str:
    plain = unicodedata.normalize("NFKC", key).upper()
    return str(int(plain)) if plain.isdigit() else plain
