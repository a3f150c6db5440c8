"""Which option a reasoning argues for, by a rule on its text: no model is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rlmed.core.types import LETTERS

_LETTER = re.compile(
    r"(?<!\w)(?:"
    r"(?i:option|choice)[ \n]\(?([A-Ja-j])(?!\w)\)?"  # option B, Choice (b)
    r"|(?i:answer)(?:[ \n](?i:is|must be|would be|should be))?:?[ \n]\(?([A-J])(?!\w)\)?"  # the answer is B
    r"|\(([A-Ja-j])\)"  # (B)
    r"|([A-J])\)"  # B)
    r")"
)
"""A letter that is marked as one. "A" and "I" are words too, so a capital alone is no mention."""
_SCOPE = 80
"""Characters on either side of a mention in which a negation is looked for."""
_CLAUSE_END = re.compile(r"[.,;:!?\n]|\b(?:but|so|therefore|because|since)\b", re.IGNORECASE)
_NEGATED_BEFORE = re.compile(
    r"\b(?:not?|cannot|never|neither|nor|without|excludes?|excluding|except|unlike|instead of|rul(?:es?|ed|ing) out"
    r"|(?:rather|other|more(?: \w+)?) than)\b|n['’]t\b",
    re.IGNORECASE,
)
_NEGATED_AFTER = re.compile(
    r" (?:(?:is|are|was|were|does|do|did|could|would|should|has|have)n['’]t\b|can(?:['’]t|not)\b"
    r"|(?:is|are|was|were|does|do|did|can|could|would|should|may|must|has|have|be|seems?|appears?|looks?)"
    r"(?: \w+)? (?:not|never|wrong|incorrect|excluded|unlikely|impossible|absent|ruled out)\b)",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"not?|none|never", re.IGNORECASE)
"""Options that are a word of their own only where none follows: "no" is an answer in "no." and none in "no lesion"."""
_MARKUP = re.compile(r"\*\*|`")
"""Markdown's marks of bold words and of code."""
_SAME = re.compile(r"[\s:.,()*\"'=–-]{0,8}")
"""What may stand between a letter and the text of its option."""
_LISTED = re.compile(r"\s?,?\s?(?:(or|nor|and)\s)?(?:(?:the|an?)\s)?", re.IGNORECASE)
"""What stands between the options of a list; one that "or", "nor" or "and" has joined is the last, unless another follows."""


@dataclass(frozen=True, slots=True)
class _Mention:
    """An option's text or letter, or both side by side, from character `start` up to `stop`."""

    option: int
    start: int
    stop: int


@dataclass(slots=True)
class _Chain:
    """Mentions one after the other, as in a list."""

    mentions: list[_Mention] = field(default_factory=list)
    joined: bool = False
    """A conjunction stands between two of them."""
    alternatives: bool = False
    """One that leaves the choice open."""

    def gap(self, text: str, mention: _Mention) -> re.Match[str] | None:
        """What stands between the last one and `mention`, if it is what stands in a list."""
        if not self.mentions:
            return None
        stop = self.mentions[-1].stop
        return _LISTED.fullmatch(text, stop, max(stop, mention.start))

    @property
    def undecided(self) -> bool:
        """Whether several options are joined by "or"."""
        return self.alternatives and len({mention.option for mention in self.mentions}) > 1


def argued_option(reasoning: str, options: Sequence[str]) -> int | None:
    """The option that a reasoning argues for: the last one that it mentions affirmatively.

    A mention is an option's text as whole words in any case (of overlapping texts the longest), or its letter marked as
    one: `B)`, `(B)`, `option B`, `the answer is B`. One-letter texts count by their letter only, "no" only where no word
    follows it. These don't count:

    - a negated mention: a negation before it in the same clause ("not the liver", "rather than the liver", "rules out
      the liver"), or a verb and a negation after it ("the liver is unlikely", "B) liver can't be seen");
    - what is listed with it ("rules out the liver, spleen and kidney", "the liver and spleen are unlikely"), a list being
      three options or more, or two with "and" between them: "not the liver, the spleen" argues for the spleen;
    - two or more options joined by "or" or "nor": who names alternatives has not decided.

    A rule on the text only: double negations, pronouns and irony are beyond it. Time is linear in the length of the text.

    Args:
        reasoning: what stands in the think tags.
        options: 2 to 10 texts, in the order of their letters.

    Returns:
        Index into `options`; None when nothing is argued for.

    Example:
        >>> argued_option("Not the liver, since it lies left: option B.", ("liver", "spleen"))
        1
    """
    text = "\n".join(" ".join(line.split()) for line in _MARKUP.sub("", reasoning).splitlines())
    mentions = _merged(text, sorted(_find(text, options), key=lambda mention: mention.start))
    argued = None
    for chain in _lists(text, mentions):
        listed = len(chain.mentions) > 2 or chain.joined
        if listed and (_negated_before(text, chain.mentions[0]) or _negated_after(text, chain.mentions[-1])):
            continue
        for mention in chain.mentions:
            if not (_negated_before(text, mention) or _negated_after(text, mention)):
                argued = mention.option
    return argued


def _find(text: str, options: Sequence[str]) -> Iterator[_Mention]:
    """Every mention in the normalized text."""
    places = {" ".join(option.split()): place for place, option in enumerate(options)}
    longest_first = sorted((name for name in places if not re.fullmatch(r"[A-Za-z]?", name)), key=len, reverse=True)
    if longest_first:
        # the group's number is the option's place: in any case, some letters match others than their own lower case
        names = "|".join(f"({_pattern(name)})" for name in longest_first)
        for found in re.finditer(rf"(?<!\w)(?:{names})(?!\w)", text, re.IGNORECASE):
            assert found.lastindex is not None
            yield _Mention(places[longest_first[found.lastindex - 1]], found.start(), found.end())
    for found in _LETTER.finditer(text):
        place = LETTERS.index(found[found.lastindex or 0].upper())
        if place < len(options):
            yield _Mention(place, found.start(), found.end())


def _pattern(name: str) -> str:
    """What an option's text is found by."""
    alone = r"(?![ \n]\w)" if _NEGATION.fullmatch(name) else ""
    return re.escape(name).replace(r"\ ", "[ \n]") + alone


def _merged(text: str, mentions: Sequence[_Mention]) -> list[_Mention]:
    """Mentions of one option side by side, such as "B) liver" or "liver (B)", become one."""
    merged: list[_Mention] = []
    for mention in mentions:
        last = merged[-1] if merged else None
        if last and last.option == mention.option and _SAME.fullmatch(text, last.stop, max(last.stop, mention.start)):
            merged[-1] = _Mention(last.option, last.start, max(last.stop, mention.stop))
        else:
            merged.append(mention)
    return merged


def _lists(text: str, mentions: Sequence[_Mention]) -> Iterator[_Chain]:
    """Mentions that follow one another as in a list; lists joined by "or" are left out."""
    chain = _Chain()
    for mention in mentions:
        gap = chain.gap(text, mention)
        if gap is None or (chain.joined and not gap[1]):
            if not chain.undecided:
                yield chain
            chain = _Chain()
        elif gap[1]:
            chain.joined = True
            chain.alternatives = chain.alternatives or gap[1].lower() != "and"
        chain.mentions.append(mention)
    if not chain.undecided:
        yield chain


def _negated_before(text: str, mention: _Mention) -> bool:
    clause = _CLAUSE_END.split(text[max(0, mention.start - _SCOPE) : mention.start])[-1]
    return _NEGATED_BEFORE.search(clause) is not None


def _negated_after(text: str, mention: _Mention) -> bool:
    return _NEGATED_AFTER.match(text[mention.stop : mention.stop + _SCOPE]) is not None
