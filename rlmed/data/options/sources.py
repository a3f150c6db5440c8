"""Read options in source forms: lists, mappings from letters or numbers, pairs, JSON in a cell."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlmed.core.files.near_paths import visible
from rlmed.core.types import LETTERS
from rlmed.data.options.labels import key_name
from rlmed.data.rows import BadRowError, shorten

AsText = Callable[[Any], str]
"""Return an option as stripped text; "" for a missing one. Raises BadRowError."""
_LABELS, _TEXTS = ("label", "labels", "key", "letter", "id"), ("text", "texts", "value", "option", "content")


@dataclass(frozen=True, slots=True)
class Options:
    """Options as in the source.

    Example:
        Options(("liver", "", "spleen"), ("A", "B", "C")) of {"A": "liver", "B": null, "C":
        "spleen"}
    """

    texts: tuple[str, ...]
    """Stripped; "" for one that the source lacks."""
    names: tuple[str, ...] = ()
    """The source's name of each, by `key_name`; empty if the source only orders them."""
    what: str = "key"
    """The kind of name, for messages."""
    numbers: bool = False
    """True if the source holds numbers instead of texts."""


def read_options(value: Any, as_text: AsText) -> Options:
    """Read options from a list, a mapping from their names, or a list of such pairs.

    Args:
        value: as JSON or pyarrow give it: `["liver", …]`, `{"A": "liver", …}`, `[("A", "liver"),
            …]`, `{"label": ["A", …], "text": ["liver", …]}` or `[{"key": "A", "value": "liver"},
            …]`.
        as_text: converts an option to text.

    Raises:
        BadRowError: for anything else, or two options with one name.
    """
    pairs = _pairs(value)
    if pairs is None:
        if not isinstance(value, (list, tuple)):
            raise BadRowError(f"its options are {shorten(value)}, not a list")
        return Options(tuple(map(as_text, value)), numbers=_numbers(value))
    entries = [(key_name(key if isinstance(key, str) else as_text(key)), as_text(text)) for key, text in pairs]
    used = [name for name, text in entries if text]
    _check_names(entries, used)
    # tables have a field for each key of any row: other rows' keys are blank here, perhaps beside
    # used ones
    kinds = {kind_of(name) for name in used}
    names = list(dict.fromkeys(name for name, _ in entries if kind_of(name) in kinds))
    texts = {name: text for name, text in entries if text}
    return Options(
        tuple(texts.get(name, "") for name in names), tuple(names), numbers=_numbers([text for _, text in pairs])
    )


def _check_names(entries: Sequence[tuple[str, str]], used: Sequence[str]) -> None:
    """Raise BadRowError for duplicate names, or names only some of which are letters."""
    for name, count in Counter(used).items():
        if count > 1:
            first, second = [text for other, text in entries if other == name and text][:2]
            raise BadRowError(f"its options have the key {name} twice, for {shorten(first)} and {shorten(second)}")
    if len({kind_of(name) for name in used}) > 1:
        raise BadRowError(
            f"its options are called {shorten(list(used))}: call all by letters A to J, or all by numbers"
        )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object with distinct keys (`object_pairs_hook` of `json`). Raises BadRowError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        values = [value for other, value in pairs if other == key]
        raise BadRowError(f"it has the key {shorten(key)} twice, for {shorten(values[0])} and {shorten(values[1])}")
    return found


def parse_options(text: str) -> Any:
    """Parse a cell of options as JSON.

    Raises:
        BadRowError: for invalid JSON, or an object with a duplicate key.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except BadRowError as error:
        raise BadRowError(f"in its options, {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadRowError(
            f'its options {shorten(text)} are not a JSON list: write ["liver", "spleen"], or one column an option'
        ) from error


def plain_option(text: str) -> str:
    """Strip white space and invisible characters from an option; "" for pandas' missing values."""
    plain = visible(text)
    return "" if plain.casefold() in ("nan", "<na>") else plain


def is_nothing(value: Any) -> bool:
    """Return whether a value is null, or NaN, which stands for it in tables."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _pairs(value: Any) -> list[tuple[Any, Any]] | None:
    """Return name and text of each option; None for a value without names."""
    if isinstance(value, Mapping):
        keys = {str(key).casefold(): key for key in value}
        columns = [value[keys[name]] for names in (_LABELS, _TEXTS) for name in names if name in keys]
        if len(columns) == len(keys) == 2 and all(isinstance(column, (list, tuple)) for column in columns):
            if len(columns[0]) != len(columns[1]):
                raise BadRowError(f"its options have {len(columns[0])} names and {len(columns[1])} texts")
            return list(zip(*columns, strict=True))
        return list(value.items())
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if all(isinstance(entry, tuple) and len(entry) == 2 for entry in value):
        return list(value)  # a map, as pyarrow returns it
    if all(isinstance(entry, Mapping) and len(entry) == 2 for entry in value):
        found = [_pairs({key: [text] for key, text in entry.items()}) for entry in value]
        named = [pairs[0] for pairs in found if pairs is not None and len(pairs) == 1]
        return named if len(named) == len(value) else None
    return None


def _numbers(values: Sequence[Any]) -> bool:
    there = [value for value in values if not is_nothing(value)]
    return bool(there) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in there)


def kind_of(name: str) -> Literal["letter", "number", "word"]:
    """Return the kind of a `key_name` name; only letters and numbers have an inherent order."""
    if name.isascii() and name.isdigit() and len(name) <= 3:
        return "number"
    return "letter" if len(name) == 1 and name in LETTERS else "word"
