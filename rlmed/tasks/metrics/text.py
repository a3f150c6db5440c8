"""Compare short texts: exact match, token F1 and recall after a published normalisation.

The normalisation is that of the VQA evaluation (Antol et al. 2015, arXiv 1505.00468), which the
evaluations of VQA-RAD (Lau et al. 2018) and of LLaVA-Med (Li et al. 2023, arXiv 2306.00890) use,
too: lower case, no articles, no punctuation, number words as digits. Differences:

- left out: number words above ten, "none" as 0, and the table of contractions (an apostrophe inside
  a word goes, so that "isn't" and "isnt" are one);
- kept, as medical answers depend on them: the sign of a number (-5), the sign at the end of a word
  ("HER2+"), and a decimal point;
- added: full-width forms as ASCII, canonical composition (NFC), LaTeX commands before a brace
  removed, letters and marks of all scripts kept.

All functions take linear time in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby, islice

ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)}
WITHOUT_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Chinese characters and Japanese syllables, of which each is a token."""

_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20, 0x2212: 0x2D}
_MOST_MARKS = 30
_LATEX = re.compile(r"\\[a-zA-Z]++(?=\{)")
_APOSTROPHE = re.compile("(?<=[^\\W_])['\u2019](?=[^\\W_])")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NO_LETTER = re.compile(r"[\W_]")
_TOKEN = re.compile(rf"[{WITHOUT_SPACES}]|[^\s{WITHOUT_SPACES}]+")
_WORD = re.compile(r"[^\W_]+")


def ascii_forms(text: str) -> str:
    """Return the text with full-width forms and the minus sign as ASCII, character by character.

    Example:
        >>> ascii_forms("［１０，２０］")
        '[10,20]'
    """
    return text if text.isascii() else text.translate(_ASCII)


def without_latex(text: str) -> str:
    r"""Return the text with a space for each LaTeX command before a brace.

    Example:
        >>> without_latex(r"\text{liver}")
        ' {liver}'
    """
    return _LATEX.sub(" ", text)


def normalise(text: str) -> str:
    """Return the text in lower case, without articles and punctuation, number words as digits.

    See the module's docstring for what is kept. A text of articles alone keeps them; one of
    punctuation alone is "".

    Example:
        >>> normalise("The Left lung's upper lobe, 1.5 cm; TWO nodules.")
        'left lungs upper lobe 1.5 cm 2 nodules'
    """
    text = without_latex(_composed(ascii_forms(text).lower()))
    text = _THOUSANDS.sub("", _APOSTROPHE.sub("", text))
    words = _NO_LETTER.sub(_kept, text).split()
    return " ".join(NUMBER_WORDS.get(word, word) for word in words if word not in ARTICLES) or " ".join(words)


def tokens(text: str) -> list[str]:
    """Return the normalised text's words; each Chinese character is one.

    Scripts without spaces other than Chinese and Japanese, such as Thai, have few, long words.

    Example:
        >>> tokens("The liver"), tokens("左肺CT")
        (['liver'], ['左', '肺', 'ct'])
    """
    return _TOKEN.findall(normalise(text))


def yes_no(text: str) -> str | None:
    """Return "yes" or "no" if the text begins with that word; None otherwise.

    Example:
        >>> yes_no("Yes, there is"), yes_no("There is no fracture")
        ('yes', None)
    """
    first = _WORD.search(ascii_forms(text))
    word = first[0].lower() if first else ""
    return word if word in ("yes", "no") else None


def exact_match(answer: str, references: str | Sequence[str]) -> float:
    """Return 1.0 if the answer equals a reference after normalisation, else 0.0.

    To the reference "yes" or "no", only the answer's first word counts, see `yes_no`.

    Args:
        references: one text or several accepted ones.

    Example:
        >>> exact_match("The Liver.", ["liver", "hepar"]), exact_match("Yes, there is", "yes")
        (1.0, 1.0)

    Raises:
        ValueError: without references.
    """
    return _best(_equal, answer, references)


def token_f1(answer: str, references: str | Sequence[str]) -> float:
    """Return the best F1 of the answer's tokens over the references, from 0 to 1.

    Tokens are a multiset: F1 = 2 · shared / (tokens of the answer + tokens of the reference), as in
    SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250). It is 0 where either has no token.

    Example:
        >>> token_f1("left lung", "lung"), token_f1("左肺", "左上肺")
        (0.6666666666666666, 0.8)

    Raises:
        ValueError: without references.
    """
    return _best(_f1, answer, references)


def recall(answer: str, references: str | Sequence[str]) -> float:
    """Return the best share of a reference's tokens that the answer has, from 0 to 1.

    LLaVA-Med's metric of open questions, with tokens as a multiset. Long answers are not penalised:
    for evaluation, not as a reward.

    Example:
        >>> recall("in the left lung", ["right lung", "both lungs"])
        0.5

    Raises:
        ValueError: without references.
    """
    return _best(_recall, answer, references)


def _best(score: Callable[[str, str], float], answer: str, references: str | Sequence[str]) -> float:
    references = [references] if isinstance(references, str) else references
    if not references:
        raise ValueError("references=[] leaves nothing to compare the answer with: give at least one text")
    return max(score(answer, reference) for reference in references)


def _equal(answer: str, reference: str) -> float:
    right = tokens(reference)
    if right in (["yes"], ["no"]):
        return float(yes_no(answer) == right[0])
    if not right:
        return float(answer.strip() == reference.strip() != "")
    return float(tokens(answer) == right)


def _shared(answer: str, reference: str) -> tuple[int, int, int]:
    """Count the tokens of both, of the answer, and of the reference."""
    given, right = Counter(tokens(answer)), Counter(tokens(reference))
    return (given & right).total(), given.total(), right.total()


def _f1(answer: str, reference: str) -> float:
    shared, given, right = _shared(answer, reference)
    return 2 * shared / (given + right) if shared else 0.0


def _recall(answer: str, reference: str) -> float:
    shared, _, right = _shared(answer, reference)
    return shared / right if right else 0.0


def _composed(text: str) -> str:
    """Return the text in NFC, each run of marks cut after 30 as in Unicode's stream-safe format.

    Composition sorts a run of marks in quadratic time; no language writes runs that long
    (UAX 15, section 13).
    """
    if text.isascii():
        return text
    runs = groupby(text, key=lambda letter: unicodedata.combining(letter) > 0)
    safe = "".join("".join(islice(run, _MOST_MARKS) if marks else run) for marks, run in runs)
    return unicodedata.normalize("NFC", safe)


def _kept(found: re.Match[str]) -> str:
    """Return what stands for a character that is neither letter nor digit."""
    character, text, place = found[0], found.string, found.start()
    category = unicodedata.category(character)
    if category[0] == "M" or character == "%":
        return character
    if category == "Cf":
        return ""  # joins or hides, parts nothing
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    point = character == "." and after.isdecimal() and not before.isalpha()
    sign = character == "-" and after.isdecimal() and not before.isalnum()
    ending = character in "+-" and before.isalnum() and (after.isspace() or after in ",.;)")
    return character if point or sign or ending else " "
