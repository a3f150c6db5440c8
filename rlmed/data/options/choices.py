"""Resolve the options and the answer of a question, given by letters, keys, positions or texts.

A source may name an option by a key or column (`{"A": "liver", "C": "spleen"}`), by a letter in its
text (`C. spleen`), or only by its position; an answer may be any of these, or the text. Every
possible reading is considered. If all agree, the result is the options as texts without letters, in
letter order. If two differ, the row is skipped, and the reason names both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlmed.core.files.near_paths import look_alike, visible
from rlmed.core.types import LETTERS
from rlmed.data.options.labels import (
    Label,
    are_a_series,
    bare_name,
    key_name,
    name_in_series,
    own_label,
    own_labels,
)
from rlmed.data.options.order import names_letters, names_numbers
from rlmed.data.options.sources import Options, kind_of
from rlmed.data.rows import BadRowError, shorten

Claim = tuple[str, int]
"""How an answer is read, and the source index that it then means."""
Form = Literal["any", "text", "name"]
_OWN, _BARE_TEXT = "by the options' own letters", "as a text without its letter"
_UNSURE = (_OWN, _BARE_TEXT)
"""Readings that hold only if the letters at the start of the texts are labels."""
_MISSING = -1
"""Index of an option that the source omits."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of a question as shown, and the index of the correct one.

    Example:
        >>> choose(Options(("liver", "", "spleen"), ("A", "B", "C")), "C")
        Choice(options=('liver', 'spleen'), answer=1, same_letters=False)
    """

    options: tuple[str, ...]
    answer: int
    same_letters: bool
    """False if their letters differ from the source's, since one is missing there."""


def choose(
    given: Options, answer: str, *, form: Form = "any", first: int | None = None, number: bool = False
) -> Choice:
    """Return the options without their own letters, and the correct one.

    Args:
        given: the options.
        answer: an option's text, its name, or both (`B. spleen`).
        form: "text" if the answer cannot be a name, "name" if it cannot be a text.
        first: the answer is an index, and this is the first option's.
        number: the source holds the answer as a number of unstated meaning.

    Raises:
        BadRowError: for too few or too many options, duplicates, or an answer that matches none or
            is ambiguous.
    """
    shown, answer = _Shown(given), visible(answer)
    if not answer:
        raise BadRowError("it has no answer")
    claims = shown.claims(answer, form) if first is None else shown.counted(answer, first)
    if not claims:
        raise BadRowError(
            shown.no_match(answer, first)
            if first is not None
            else f"its answer {shorten(answer)} is not among its options {shorten(list(shown.raw))}{shown.hint(answer)}"
        )
    if number and first is None and not given.numbers and not shown.by_number:
        claims += [claim for start in (0, 1) for claim in shown.counted(answer, start)]
    indices = {index for _, index in claims}
    if len(indices) > 1 or not shown.text(claims[0][1]):
        raise BadRowError(shown.contradiction(answer, claims))
    if not shown.labelled and all(how in _UNSURE for how, _ in claims):
        shown = _Shown(given, labelled=True)
    return shown.choice(indices.pop())


def plain_options(texts: Sequence[str]) -> tuple[str, ...]:
    """Return options without their own letters, in letter order.

    Raises:
        BadRowError: for too few or too many, or duplicates.
    """
    shown = _Shown(Options(tuple(map(visible, texts))))
    return shown.choice(shown.order[0]).options


def written_answer(options: tuple[str, ...], answer: int) -> str:
    """Write the correct option for a file: text, with letter if the text may be another's letter.

    Example:
        >>> written_answer(("liver", "spleen"), 1), written_answer(("B", "A"), 1)
        ('spleen', 'B) A')
    """
    text = options[answer]
    if bare_name(text) is None and own_label(text) is None:
        return text
    try:
        plain = choose(Options(options), text).answer == answer
    except BadRowError:
        plain = False
    return text if plain else f"{LETTERS[answer]}) {text}"


@dataclass(frozen=True, slots=True)
class _Naming:
    """One way of naming options, with their indices in the source, blank ones included."""

    how: str
    indices: Mapping[str, int]
    certain: bool = True
    """False for letters at the start of the texts that may be part of them."""


class _Shown:
    """Options as they will be shown, and all names of each.

    Indices count the source's options, blank ones included.
    """

    def __init__(self, given: Options, *, labelled: bool = False) -> None:
        """Parse `given`; with `labelled`, letters at the start of all texts surely are labels.

        Raises BadRowError.
        """
        self.given = given
        self.there = [index for index, text in enumerate(given.texts) if text]
        self.raw = tuple(given.texts[index] for index in self.there)
        if not 2 <= len(self.there) <= len(LETTERS):
            count = len(self.there)
            raise BadRowError(f"it has {count} option{'s' * (count != 1)}; 2 to {len(LETTERS)} are possible")
        found = own_labels(self.raw)
        indices = {index: label for label, index in zip(found, self.there, strict=bool(found)) if label}
        self.some = 0 < len(indices) < len(self.there)
        """Return whether only some options bring a letter: `A. liver`, `all of the above`."""
        certain = bool(indices) and self._certain(indices)
        if self.some and not certain and not all(label.sure for label in indices.values()):
            indices = {}
        self.labelled = certain or (labelled and bool(indices))
        labels, own = list(indices.values()), {label.name: index for index, label in indices.items()}
        self.texts = list(given.texts)
        bare = [indices[index].rest if index in indices else given.texts[index] for index in self.there]
        # texts that refer to each other by number keep their numbers: options are shown with
        # letters
        if self.labelled and not any(map(names_numbers, bare)):
            for index, text in zip(indices, _without(labels), strict=True):
                self.texts[index] = text
        _check_distinct([self.texts[index] for index in self.there])
        names = given.names or (own if self.labelled else ())
        self.by_number = any(kind_of(name) == "number" for name in names)
        """Return whether a number names each option."""
        self.rests = {label.rest.casefold(): own[label.name] for label in labels}
        self.order = self._ordered(own if self.labelled else {})
        self.namings = self._namings(own)

    def _certain(self, labels: Mapping[int, Label]) -> bool:
        """Return whether texts begin with ordered labels, not own letters as in `E. coli`."""
        if are_a_series([label.name for label in labels.values()]):
            return True
        sure = all(label.sure for label in labels.values())
        if self.some:
            return self._as_called(labels) and (sure or len(labels) > 2 or bool(self.given.names))
        return self._as_called(labels) or sure

    def _as_called(self, labels: Mapping[int, Label]) -> bool:
        called = self.given.names or tuple(LETTERS)
        return all(index < len(called) and label.name == called[index] for index, label in labels.items())

    def _ordered(self, own: Mapping[str, int]) -> list[int]:
        called = self.given.names
        by_name = {called[index]: index for index in self.there} if called else own
        if not by_name or any(kind_of(name) == "word" for name in by_name):
            return self.there
        ordered = [by_name[name] for name in sorted(by_name, key=lambda name: (name.isdigit() and int(name), name))]
        others = [index for index in self.there if index not in ordered]
        # if each stands at its letter's index, so do those without a letter
        in_order = all(name == LETTERS[self.there.index(index)] for name, index in by_name.items())
        return self.there if in_order else ordered + others

    def _namings(self, own: Mapping[str, int]) -> list[_Naming]:
        called, what = self.given.names, f"by its {self.given.what}"
        found = [_Naming(what, {name: index for index, name in enumerate(called)})] if called else []
        if own:
            found.append(_Naming(_OWN, own, self.labelled))
        certain = [name for naming in found if naming.certain for name in naming.indices]
        lettered = any(kind_of(name) == "letter" for name in certain)
        if lettered and (called or not self.some):
            return found
        # letters then count the options: the shown ones, or the source's, with others between them
        found.append(_Naming("by its position", dict(zip(LETTERS, self.order, strict=False))))
        counted = {index: index for index in range(self.there[-1] + 1)}
        if called and self.by_number:
            start = 0 if "0" in called else 1
            numbered = {int(name) - start: index for index, name in enumerate(called) if kind_of(name) == "number"}
            counted = {rank: numbered.get(rank, _MISSING) for rank in range(min(max(numbered) + 1, len(LETTERS)))}
        every = {LETTERS[rank]: index for rank, index in counted.items() if rank < len(LETTERS)}
        found.append(_Naming("by its position in the source", every))
        if not (lettered and self.labelled):
            return found
        # an option that brings a letter has no other name
        return [
            found[0],
            *(_Naming(one.how, {k: v for k, v in one.indices.items() if k not in own}) for one in found[1:]),
        ]

    def claims(self, answer: str, form: Form) -> list[Claim]:
        """Return every reading of an answer that is not an index."""
        exact = self._by_text(answer) if form != "name" else []
        if form == "text":
            return exact
        name = (
            name_in_series(self.raw, answer)
            or bare_name(answer)
            or (key_name(answer) if self.given.names and not exact else "")
        )
        found = exact + [(naming.how, naming.indices[name]) for naming in self.namings if name in naming.indices]
        label = own_label(answer)
        if found or label is None:
            return found
        # it gives both: the text must exist, and the letter or number must be its own
        numbers = _Naming("by its number", {str(rank): index for rank, index in enumerate(self.order, 1)})
        named = [(one.how, one.indices[label.name]) for one in (*self.namings, numbers) if label.name in one.indices]
        texts = self._by_text(label.rest)
        agreeing = [(how, index) for how, index in named if index in {at for _, at in texts}]
        return texts + (agreeing or named) if texts and named else []

    def _by_text(self, answer: str) -> list[Claim]:
        key = answer.casefold()
        for texts in (self.given.texts, self.texts):
            indices = [index for index, text in enumerate(texts) if text.casefold() == key]
            if indices:
                return [("as a text", index) for index in indices]
        return [(_BARE_TEXT, self.rests[key])] if key in self.rests else []

    def counted(self, answer: str, first: int) -> list[Claim]:
        """Return readings of an answer as an index into options shown, the source's, and names."""
        if not (answer.isascii() and answer.isdigit() and len(answer) <= 3):
            return []
        index, how, called = int(answer) - first, f"counted from {first}", self.given.names
        claims = [(how, self.order[index])] if 0 <= index < len(self.order) else []
        claims += [(f"{how} in the source", index)] if 0 <= index <= self.there[-1] else []
        named = {name: at for at, name in enumerate(called)}
        if answer in named:
            claims.append((f"by its {self.given.what}", named[answer]))
        letters = [name for name in named if kind_of(name) == "letter"]
        if letters and 0 <= index <= LETTERS.index(max(letters)):
            claims.append((f"{how} as the letter {LETTERS[index]}", named.get(LETTERS[index], _MISSING)))
        return claims

    def text(self, index: int) -> str:
        """Return the text shown for a source index; "" if missing."""
        return "" if index == _MISSING else self.texts[index]

    def no_match(self, answer: str, first: int) -> str:
        """Return what is wrong with an answer that should be an index."""
        count = len(self.order)
        return f"its answer {shorten(answer)} is not the index of one of its {count} options, counted from {first}"

    def hint(self, answer: str) -> str:
        """Return what a number may mean, or a letter of another alphabet."""
        latin = look_alike(answer)
        if latin != answer and self.claims(latin, "any"):
            return f"; it is written {answer!a}, which only looks like {latin!r}"
        meant = [
            f"{how} it is {shorten(self.text(index))}"
            for first in (0, 1)
            for how, index in self.counted(answer, first)[:1]
        ]
        return f"; {', '.join(meant)}: say which with --answer-index of rlmed.prepare" if meant else ""

    def contradiction(self, answer: str, claims: Sequence[Claim]) -> str:
        """Return the readings of an answer that differ."""
        readings: dict[int, str] = {}
        for how, index in claims:
            readings.setdefault(index, how)
        meant = [
            f"{shorten(self.text(index)) if self.text(index) else 'missing'} {how}" for index, how in readings.items()
        ]
        return f"its answer {shorten(answer)} is {' and '.join(meant)}: write letter and text, like 'B) spleen'"

    def choice(self, index: int) -> Choice:
        """Return the choice with the option at a source index as the correct one.

        Raises:
            BadRowError: for options that refer to others by letters or numbers that are not shown.
        """
        options = tuple(self.texts[entry] for entry in self.order)
        same = all(self._as_shown(naming.indices) for naming in self.namings if naming.certain)
        lost = [option for option in options if not same and names_letters(option)]
        lost += [option for option in options if self.by_number and self.given.names and names_numbers(option)]
        if lost:
            raise BadRowError(
                f"its option {shorten(lost[0])} refers to other options, whose letters change "
                f"({', '.join(LETTERS[: len(options)])}): write the texts that are meant"
            )
        return Choice(options, self.order.index(index), same)

    def _as_shown(self, indices: Mapping[str, int]) -> bool:
        """Return whether letter names are the letters by which the options are shown."""
        shown = dict(zip(LETTERS, self.order, strict=False))
        letters = {name: index for name, index in indices.items() if kind_of(name) == "letter" and self.text(index)}
        return all(shown.get(name) == index for name, index in letters.items())


def _without(labels: Sequence[Label]) -> list[str]:
    """Strip labels from texts, doubled ones too: `A. A. liver`."""
    while True:
        rests = [label.rest for label in labels]
        again = [label for label in own_labels(rests) if label]
        if [label.name for label in again] != [label.name for label in labels]:
            return rests
        labels = again


def _check_distinct(texts: Sequence[str]) -> None:
    repeated = [text for text, count in Counter(text.casefold() for text in texts).items() if count > 1]
    if repeated:
        raise BadRowError(f"its option {shorten(repeated[0])} occurs more than once")
