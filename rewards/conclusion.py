"""Find the option that a reasoning argues for, by a rule on its text; no model is involved."""

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
"""A letter marked as an option. "A" and "I" are words too, so a bare capital is not a mention."""
_SCOPE = 80
"""Characters on either side of a mention that are searched for a negation."""
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
"""Options that count only if no word follows: "no" is an answer in "no." but not in "no lesion"."""
_MARKUP = re.compile(r"\*\*|`")
"""Markdown's marks for bold and code."""
_SAME = re.compile(r"[\s:.,()*\"'=–-]{0,8}")
"""What may stand between a letter and the text of its option."""
_LISTED = re.compile(r"\s?,?\s?(?:(or|nor|and)\s)?(?:(?:the|an?)\s)?", re.IGNORECASE)
"""Separators in lists of options; "or", "nor" or "and" opens the last item unless more follow."""


@dataclass(frozen=True, slots=True)
class _Mention:
    """An option's text, letter, or both side by side: characters `start` to `stop` (exclusive)."""

    option: int
    start: int
    stop: int


@dataclass(slots=True)
class _Chain:
    """Consecutive mentions, as in a list."""

    mentions: list[_Mention] = field(default_factory=list)
    joined: bool = False
    """True when a conjunction joins two of them."""
    alternatives: bool = False
    """True when that conjunction leaves the choice open."""

    def gap(self, text: str, mention: _Mention) -> re.Match[str] | None:
        """Return the separator between the last mention and `mention`, if it is one of a list."""
        if not self.mentions:
            return None
        stop = self.mentions[-1].stop
        return _LISTED.fullmatch(text, stop, max(stop, mention.start))

    @property
    def undecided(self) -> bool:
        """Return whether "or" joins several options."""
        return self.alternatives and len({mention.option for mention in self.mentions}) > 1


def argued_option(reasoning: str, options: Sequence[str]) -> int | None:
    """Return the option that a reasoning argues for: the last one it mentions affirmatively.

    A mention is an option's text as whole words in any case (the longest of overlapping texts), or
    its letter marked as one: `B)`, `(B)`, `option B`, `the answer is B`. One-letter texts count by
    their letter only, "no" only where no word follows it. These don't count:

    - a negated mention: a negation before it in the same clause ("not the liver", "rather than the
      liver", "rules out the liver"), or a verb and a negation after it ("the liver is unlikely",
      "B) liver can't be seen");
    - options listed with a negated one ("rules out the liver, spleen and kidney", "the liver and
      spleen are unlikely"); a list has three or more options, or two joined by "and": "not the
      liver, the spleen" argues for the spleen;
    - two or more options joined by "or" or "nor": naming alternatives is not deciding.

    The rule sees text only: double negations, pronouns and irony are beyond it. It takes linear
    time.

    Args:
        reasoning: text inside the think tags.
        options: 2 to 10 texts, in letter order.

    Returns:
        Index into `options`; None when it argues for nothing.

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
    """Return every mention in the normalized text."""
    indices = {" ".join(option.split()): index for index, option in enumerate(options)}
    longest_first = sorted((name for name in indices if not re.fullmatch(r"[A-Za-z]?", name)), key=len, reverse=True)
    if longest_first:
        # the group's number is the option's index: ignoring case, some letters match more than
        # their own lower case
        names = "|".join(f"({_pattern(name)})" for name in longest_first)
        for found in re.finditer(rf"(?<!\w)(?:{names})(?!\w)", text, re.IGNORECASE):
            assert found.lastindex is not None
            yield _Mention(indices[longest_first[found.lastindex - 1]], found.start(), found.end())
    for found in _LETTER.finditer(text):
        index = LETTERS.index(found[found.lastindex or 0].upper())
        if index < len(options):
            yield _Mention(index, found.start(), found.end())


def _pattern(name: str) -> str:
    """Return the pattern that finds an option's text."""
    alone = r"(?![ \n]\w)" if _NEGATION.fullmatch(name) else ""
    return re.escape(name).replace(r"\ ", "[ \n]") + alone


def _merged(text: str, mentions: Sequence[_Mention]) -> list[_Mention]:
    """Merge adjacent mentions of one option, such as "B) liver" or "liver (B)"."""
    merged: list[_Mention] = []
    for mention in mentions:
        last = merged[-1] if merged else None
        if last and last.option == mention.option and _SAME.fullmatch(text, last.stop, max(last.stop, mention.start)):
            merged[-1] = _Mention(last.option, last.start, max(last.stop, mention.stop))
        else:
            merged.append(mention)
    return merged


def _lists(text: str, mentions: Sequence[_Mention]) -> Iterator[_Chain]:
    """Group mentions that follow one another as in a list; drop lists joined by "or"."""
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
