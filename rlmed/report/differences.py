"""Mark how the words of an answer differ from a reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

from rlmed.tasks.metrics.text import ARTICLES, WITHOUT_SPACES, normalise, token_f1

WORDS = 600
"""Most words of either text that are compared: difflib's time grows with their square."""

_PIECE = re.compile(rf"\s*(?:[{WITHOUT_SPACES}]|[^\s{WITHOUT_SPACES}]+)")
_DENSE = re.compile(f"[{WITHOUT_SPACES}]")

Kind = Literal["same", "added", "missing"]


class Part(NamedTuple):
    """A run of words.

    Example:
        >>> Part("missing", " ", "left lung").kind
        'missing'
    """

    kind: Kind
    """Added: in the answer only; missing: in the reference only."""
    space: str
    """White space before it."""
    text: str


class _Word(NamedTuple):
    key: str
    """The normalised word, by which words are compared."""
    text: str
    """The word as written, with what is left out of the key: articles before it, punctuation."""


def differences(answer: str, references: Sequence[str]) -> list[Part]:
    """Return the answer's words in order, between them those of the nearest reference it lacks.

    Words are compared as `normalise` writes them, so case, punctuation and articles do not matter;
    each Chinese character is a word. Nearest is the reference of the highest token F1.

    Example:
        >>> [tuple(part) for part in differences("The large cyst.", ["a cyst in the liver"])]
        [('added', '', 'The large'), ('same', ' ', 'cyst.'), ('missing', ' ', 'in the liver')]
    """
    nearest = max(references, key=lambda reference: token_f1(answer, reference))
    given, right = _words(answer), _words(nearest)
    given, rest, right = given[:WORDS], given[WORDS:], right[:WORDS]
    matcher = SequenceMatcher(None, [word.key for word in right], [word.key for word in given], autojunk=False)
    runs: list[tuple[Kind, Sequence[_Word]]] = []
    for kind, start, end, first, last in matcher.get_opcodes():
        if kind == "equal":
            runs.append(("same", given[first:last]))
        else:
            runs += [("missing", right[start:end]), ("added", given[first:last])]
    parts: list[Part] = []
    for name, words in [*runs, ("same", rest)]:
        if text := "".join(word.text for word in words):
            bare = text.lstrip()
            space = text[: len(text) - len(bare)]
            parts.append(Part(name, space or " " * (bool(parts) and not _dense(parts[-1].text, bare)), bare))
    return parts


def _dense(before: str, after: str) -> bool:
    """Return whether two texts of a script without spaces meet."""
    return bool(_DENSE.match(before[-1]) and _DENSE.match(after[0]))


def _words(text: str) -> list[_Word]:
    """Return the words; an article joins the next one, punctuation alone the previous one."""
    words: list[_Word] = []
    articles = ""
    for piece in _PIECE.findall(text.strip()):
        key = normalise(piece)
        if key in ARTICLES:
            articles += piece
        elif key or not words:
            words.append(_Word(key, articles + piece))
            articles = ""
        else:
            words[-1] = _Word(words[-1].key, words[-1].text + articles + piece)
            articles = ""
    if articles:
        last = words.pop() if words else _Word(articles.strip(), "")
        words.append(_Word(last.key, last.text + articles))
    return words
