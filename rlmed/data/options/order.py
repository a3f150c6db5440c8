"""Recognize options that refer to others, so fix the order: `A and C`, `both`, `none of these`.

A rule on the whole text of an option. A question with such an option is never shuffled. A false
positive only keeps an order that could have changed: no answer becomes wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rlmed.data.rows import shorten

_ONE = r"[(\[]?(?:option |choice |answer )?[a-j][)\]]?"
_NUMBER = r"[(\[]?\d[)\]]?"
_WORDS = "and|or|plus|as well as|and/or|nor|to|through|und|oder|noch|als auch|et|ou|ni|y|o|e"
_AND = rf"(?: ?[,;&+/、，] ?(?:and |or )?| ?[-–—] ?| (?:{_WORDS}) |[和及与或])"
_BEFORE = r"(?:(?:both|either|neither|only|all of|none of|any of|options?|choices?|answers?|sowohl|weder|beide|ni|les deux) ?)*"
_AFTER = r"(?: (?:only|alone|together|both|nur|(?:is|are)(?: \w+)?(?: (?:correct|true|right|false|wrong|possible|present))?))?"
_SEVERAL = rf"{_BEFORE}{_ONE}(?:{_AND}{_ONE})+{_AFTER}"
_LETTERS = re.compile(
    rf"{_SEVERAL}"  # A and C; both A and B are correct
    rf"|(?:only|option|choice|answer) {_ONE}|{_ONE} (?:only|alone)"
    rf"|(?:all|any|none|everything|alle)\b.* (?:except|but|besides|außer) (?:{_ONE}|{_SEVERAL})"
    rf"|(?:same as|not|neither|as in) (?:{_ONE}|{_SEVERAL})"
)
_NUMBERS = re.compile(rf"{_BEFORE}{_NUMBER}(?:{_AND}{_NUMBER})+{_AFTER}")
_SOME = (
    r"(?:all|none|both|neither|either|any|each|every|some|no|not all|not any|one|two|three|more than one|at least one)"
)
_THERE = r"(?:above|below|preceding|previous|foregoing|following|aforementioned|listed|mentioned|given|two|three)"
_RELATIVE = re.compile(
    # all of the above, any above; but not: both above and below the knee
    rf"{_SOME}(?: of)?(?: the| all| these)* (?:above|below)(?!,? (?:and|or) (?:below|above)| the\b)\b.*"
    rf"|{_SOME} of (?:the|these|those) {_THERE}\b.*"
    rf"|{_SOME} of (?:these|those|them)(?: \w+){{0,3}}"
    rf"|{_SOME} (?:of )?(?:the |these |those )?(?:\w+ )?(?:options?|choices?|answers?|alternatives?|others)(?: \w+){{0,4}}"
    r"|(?:all|none|both|neither|either|any)(?: (?:is|are|apply|applies))?"
    r"(?: (?:correct|true|right|false|wrong|possible|applicable|listed|mentioned))?"
    r"|(?:everything|nothing)(?: listed| mentioned)?(?: of)?(?: the)? above"
    r"|all (?:of )?(?:the )?(?:three|four|five|\d)|(?:all|none) (?:of )?(?:the )?statements\b.*"
    r"|(?:the )?above (?:all|both|options|are)\b.*|(?:the )?(?:first|last) (?:two|three)(?: \w+)?"
)
_OTHER_LANGUAGES = re.compile(
    # German
    r"(?:alle|beides?|keine[rs]?|keins)(?: (?:davon|von (?:beiden|diesen|den|allen)\b.*|(?:der |die )?(?:oben|oberen"
    r"|obigen|genannten|aufgeführten|vorherigen|vorstehenden|anderen|antworten)\b.*|(?:ist|sind) \w+))?|weder noch"
    # French
    r"|(?:tous|toutes|aucune?|les deux|ni lune? ni lautre)"
    r"(?: (?:les|des|de ces) (?:deux|réponses|options|choix|propositions)\b.*| ci-dessus)?"
    # Spanish, Portuguese, Italian
    r"|(?:tod[oa]s|ningun[oa]|ningún|amb[oa]s|nenhuma?|tutt[ei]|nessun[oa]|entramb[ie])"
    r"(?: (?:l[oae]s?|a?[os]|as|de l[oa]s|de est[oa]s|d[ao]s|anteriores|gli|i|delle|dei|di)\b.*)?"
    r"|(?:nichts|alles) (?:davon|von alledem|obige|genannte)|alle aussagen .*"
    r"|tout ce qui précède|rien de ce qui précède|toutes ces réponses|aucun des précédents"
    r"|(?:todo|nada de) lo anterior|(?:todas|todos|ambas|ambos) son \w+"
    # Dutch, Swedish, Polish, Russian
    r"|(?:alle|geen van)(?: de)? bovenstaande|(?:alla|ingen av) ovanstående|(?:wszystkie|żadne z) powyższych?"
    r"|вс[её] (?:вышеперечисленное|перечисленное)|(?:ничего|ни один) из (?:вышеперечисленного|перечисленных)"
    # Chinese, Japanese
    r"|(?:以上|上述|上記|いずれも|すべて|いずれでも|どちらでも).*|(?:都对|全部正确|両方)|(?:两者|兩者|二者)(?:都|均|皆).*|(?:都|均|皆)(?:是|不是|有|没有|非|正确|不正确).*|全部(?:都)?是?"
)


def refers_to_others(option: str) -> bool:
    """Return whether a text makes sense only with the other options in their order.

    Example:
        >>> [refers_to_others(text) for text in ("A and C", "All of the above.", "both", "both lungs", "hepatitis A")]
        [True, True, True, False, False]
    """
    text = _plain(option)
    return any(rule.fullmatch(text) for rule in (_LETTERS, _RELATIVE, _OTHER_LANGUAGES))


def names_letters(option: str) -> bool:
    """Return whether a text names other options by their letters: `A and C`, `only (b)`."""
    return _LETTERS.fullmatch(_plain(option)) is not None


def names_numbers(option: str) -> bool:
    """Return whether a text consists of two or more numbers: `1 and 3`, `both 2 and 3`."""
    return _NUMBERS.fullmatch(_plain(option)) is not None


def keeps_order(options: Sequence[str]) -> bool:
    """Return whether an option refers to others, so that only the given order makes sense."""
    return any(refers_to_others(option) for option in options)


def kept_orders(rows: Iterable[Sequence[str]]) -> tuple[int, str]:
    """Count rows whose options keep their order; return the first option causing it, "" if none."""
    kept = [options for options in rows if keeps_order(options)]
    return len(kept), next((option for options in kept for option in options if refers_to_others(option)), "")


def kept_order_text(kept: int, rows: int, option: str) -> str:
    """Describe how many rows of a file keep option order, and why; `option`: see `kept_orders`."""
    example = f", such as {shorten(option)}" if option else ""  # earlier versions did not record it
    return f"{kept} of {rows} rows keep the order of their options, since one refers to others{example}"


def _plain(option: str) -> str:
    """Normalize to lower case and single blanks, without quotation marks or a final full stop."""
    return " ".join(re.sub("[\"'“”‘’]", "", option.casefold()).split()).rstrip(" .。!;:")
