"""Read lists of labels as models write them, and score sets: precision, recall, F1 over rows.

A set is a tuple of distinct labels. Reading takes linear time in the length of the text.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rlmed.core.files.near_paths import near_path
from rlmed.tasks.metrics.text import ascii_forms, normalise

NO_SYNONYMS: Mapping[str, str] = MappingProxyType({})
Rows = Iterable[tuple[Collection[str], Collection[str]]]
"""Predicted and true labels of each row."""

_FENCE = re.compile(r"```\w*+|<[a-zA-Z/|][^<>]*>")
_SEPARATOR = re.compile(r"[,;\n、]|\band\b|和|以?及", re.IGNORECASE)
_BULLET = re.compile(r"\s*+(?:[-*•]|\d++[.)])\s++")


class Scores(NamedTuple):
    """Precision, recall and F1, each from 0 to 1.

    Example:
        >>> sample_scores([({"cyst", "mass"}, {"cyst"}), ((), ())])
        Scores(precision=0.75, recall=1.0, f1=0.8333333333333333)
    """

    precision: float
    recall: float
    f1: float


def parse_set(text: str, known: Sequence[str] = (), synonyms: Mapping[str, str] = NO_SYNONYMS) -> tuple[str, ...]:
    """Return the labels that a text names, distinct and in order; () for `none` or a blank text.

    Labels stand between commas, semicolons, "and" or line ends, perhaps with bullets, in quotes, in
    a JSON list, or after a heading and a colon. They are compared as `normalise` writes them. A
    label that is not known is returned so written: it was named, and is wrong. "none" beside labels
    is one.

    Args:
        known: possible labels; they are returned as written here, and may contain separators.
        synonyms: other spellings of labels, see `read_synonyms`; a known label is none.

    Example:
        >>> parse_set("Cysts, head & neck and a mass", ["cyst", "mass"], {"cysts": "cyst"})
        ('cyst', 'head neck', 'mass')
    """
    names = _names(tuple(known), tuple(synonyms.items()))
    pieces = [piece for piece in _pieces(text, names) if piece]
    if all(piece == "none" for piece in pieces) and ("none",) not in names.labels:
        return ()
    return tuple(dict.fromkeys(_labels(pieces, names)))


def precision(predicted: Collection[str], truth: Collection[str]) -> float:
    """Return the share of predicted labels that are true.

    Without a predicted one: 1.0 if there is no true one, else 0.0.
    """
    return _scores(*_counts(predicted, truth)).precision


def recall(predicted: Collection[str], truth: Collection[str]) -> float:
    """Return the share of true labels that are predicted.

    Without a true one: 1.0 if none is predicted, else 0.0.
    """
    return _scores(*_counts(predicted, truth)).recall


def set_f1(predicted: Collection[str], truth: Collection[str]) -> float:
    """Return 2 · shared / (predicted + true labels); 1.0 if both are empty.

    Example:
        >>> set_f1(["cyst", "mass"], ["cyst"]), set_f1([], [])
        (0.6666666666666666, 1.0)
    """
    return _scores(*_counts(predicted, truth)).f1


def sample_scores(rows: Rows) -> Scores:
    """Return the means over rows of precision, recall and F1.

    As scikit-learn's average="samples", but for rows without predicted and true labels, which are
    right: 1.0.

    Raises:
        ValueError: without rows.
    """
    return _mean([_scores(*_counts(predicted, truth)) for predicted, truth in rows], "rows")


def micro_scores(rows: Rows) -> Scores:
    """Return precision, recall and F1 of all pairs of row and label, as average="micro" does.

    All 1.0 if no row has a predicted or a true label.

    Example:
        >>> micro_scores([(("cyst", "mass"), ("cyst",)), (("cyst",), ("cyst", "mass"))]).f1
        0.6666666666666666
    """
    counts = [_counts(predicted, truth) for predicted, truth in rows]
    return _scores(*(sum(column) for column in zip(*counts, strict=True))) if counts else _scores(0, 0, 0)


def macro_scores(rows: Rows, labels: Collection[str] | None = None) -> Scores:
    """Return the means over labels of precision, recall and F1, as average="macro" does.

    Args:
        labels: those that count; None for all that are predicted or true in a row. Give the known
            ones, or each label that a model makes up counts as one with 0. A label that is
            neither predicted nor true anywhere is left out of the mean.

    Example:
        >>> macro_scores([(("cyst", "mass"), ("cyst",)), (("cyst",), ("cyst", "mass"))]).f1
        0.5

    Raises:
        ValueError: if no label is left.
    """
    shared: Counter[str] = Counter()
    given: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for predicted, truth in rows:
        shared.update({*predicted} & {*truth})
        given.update({*predicted})
        right.update({*truth})
    seen = given.keys() | right.keys()
    counted = sorted(seen if labels is None else seen & {*labels})
    return _mean([_scores(shared[label], given[label], right[label]) for label in counted], "labels")


def read_synonyms(path: Path) -> Mapping[str, str]:
    """Return a file's canonical label by spelling.

    Args:
        path: a JSON object (suffix .json) or a CSV file of two columns without a heading, spelling
            and canonical label; UTF-8.

    Raises:
        ValueError: if it cannot be read, is neither, or gives a spelling two labels.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        near = near_path(path) or "give the path of a JSON or CSV file of spellings and labels"
        raise ValueError(f"{path} cannot be read: {error.strerror}; {near}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as CSV or JSON in UTF-8") from error
    pairs = _json_pairs(text, path) if path.suffix.lower() == ".json" else _csv_pairs(text, path)
    synonyms: dict[str, str] = {}
    for place, spelling, label in pairs:
        if not (isinstance(spelling, str) and isinstance(label, str) and spelling.strip() and label.strip()):
            raise ValueError(f"{place}: {spelling!r} -> {label!r} must be a spelling and a label, two texts")
        spelling, label = spelling.strip(), label.strip()
        if synonyms.setdefault(spelling, label) != label:
            raise ValueError(f"{place}: {spelling!r} is {label!r} and {synonyms[spelling]!r}: keep one of them")
    return synonyms


def _json_pairs(text: str, path: Path) -> Iterator[tuple[str, object, object]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'{path} is not valid JSON ({error}): write an object, {{"spelling": "label", ...}}'
        ) from error
    if not text.lstrip().startswith("{"):
        raise ValueError(f'{path} holds no JSON object: write {{"spelling": "label", ...}}')
    yield from ((str(path), spelling, label) for spelling, label in pairs)


def _csv_pairs(text: str, path: Path) -> Iterator[tuple[str, object, object]]:
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        for row in reader:
            if row and len(row) != 2:
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} columns: write spelling,label in each line"
                )
            if row:
                yield f"{path}, line {reader.line_num}", row[0], row[1]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


class _Names(NamedTuple):
    labels: Mapping[tuple[str, ...], str]
    """A label by the pieces of a spelling of it."""
    longest: int
    """The largest number of pieces."""
    beginnings: frozenset[str]
    """All first pieces."""


@lru_cache(maxsize=64)
def _names(known: tuple[str, ...], synonyms: tuple[tuple[str, str], ...]) -> _Names:
    labels: dict[tuple[str, ...], str] = {}
    for label in known:
        labels.setdefault(_key(label), label)
    for spelling, label in synonyms:
        labels.setdefault(_key(spelling), labels.get(_key(label), label))
    labels.pop((), None)
    return _Names(labels, max(map(len, labels), default=1), frozenset(key[0] for key in labels))


def _key(spelling: str) -> tuple[str, ...]:
    return tuple(piece for part in _SEPARATOR.split(ascii_forms(spelling)) if (piece := normalise(part)))


def _pieces(text: str, names: _Names) -> Iterator[str]:
    """Yield what stands between separators, normalised, without bullet and heading."""
    for part in _SEPARATOR.split(_FENCE.sub("\n", ascii_forms(text))):
        bullet = _BULLET.match(part)
        piece = normalise(part[bullet.end() :] if bullet else part)
        heading, _, rest = part.rpartition(":")
        yield normalise(rest) if heading and piece not in names.beginnings else piece


def _labels(pieces: Sequence[str], names: _Names) -> Iterator[str]:
    """Yield the label of each piece, or of the most pieces that are one together."""
    place = 0
    while place < len(pieces):
        longest = min(names.longest, len(pieces) - place)
        keys = (tuple(pieces[place : place + width]) for width in range(longest, 0, -1))
        key = next((key for key in keys if key in names.labels), None)
        yield names.labels[key] if key else pieces[place]
        place += len(key) if key else 1


def _counts(predicted: Collection[str], truth: Collection[str]) -> tuple[int, int, int]:
    """Count the labels of both, the predicted and the true ones."""
    given, right = {*predicted}, {*truth}
    return len(given & right), len(given), len(right)


def _scores(shared: int, given: int, right: int) -> Scores:
    nothing = float(given == right == 0)
    return Scores(
        precision=shared / given if given else nothing,
        recall=shared / right if right else nothing,
        f1=2 * shared / (given + right) if given + right else nothing,
    )


def _mean(scores: Sequence[Scores], of_what: str) -> Scores:
    if not scores:
        raise ValueError(f"no {of_what} to take the mean of: precision, recall and F1 are not defined")
    return Scores(*(sum(column) / len(scores) for column in zip(*scores, strict=True)))
