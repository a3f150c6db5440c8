"""Tell answers that assert something from those that deny or abstain, by a rule on English words.

The rule reads sentences: one with a word such as "cannot" or "not" states nothing; of one with "no"
or "without", what stands before that word is stated. It knows no irony, double negation, other
languages, or questions. So its figures compare models with each other and are no measure of truth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlmed.core.parsing import words
from rlmed.tasks.metrics.text import normalise

ABSTAINING = frozenset(
    words(
        "not cannot cant unable unknown unclear uncertain undetermined indeterminate insufficient absent negative "
        "isnt arent wasnt doesnt dont didnt couldnt blank grey gray impossible unavailable"
    )
)
"""A sentence with one of these states nothing."""
DENYING = frozenset(words("no none nothing without nil 0 neither never"))
"""What follows one of these in its sentence is denied."""
FILLING = frozenset(
    words(
        "there is are was were be been it its this that these those i we you can could may might would with of in on at to "
        "and or but has have had as for from by which so image images picture pictures scan scans patient patients answer "
        "option question correct likely most probably therefore thus because seems evidence sign signs finding findings"
    )
)
"""Words that alone state nothing."""
SEEING = frozenset(
    words(
        "see sees seen visible visualized visualised visualize observe observes observed notice noticed noted apparent evident "
        "appear appears appearing look looks show shows showing shown reveal reveals revealed demonstrate demonstrates "
        "demonstrated depict depicts depicted display displays displayed there"
    )
)
"""Words that present something as seen; "there" as in "there is"."""
_SENTENCE = re.compile(r"[;!?\n。；！？]|\.(?!\d)|\b(?:but|however)\b", re.IGNORECASE)


def asserts_finding(text: str) -> bool:
    """Return whether a text states anything that is not denied.

    Example:
        >>> [asserts_finding(text) for text in ("liver", "No lesion.", "Cardiomegaly, no effusion", "It cannot be told")]
        [True, False, True, False]
    """
    return any(_contents(stated) for stated in _stated(text))


def claims_to_see(text: str) -> bool:
    """Return whether a sentence presents something as seen.

    Example:
        >>> claims_to_see("The liver appears enlarged."), claims_to_see("No lesion is seen."), claims_to_see("Liver")
        (True, False, False)
    """
    return any(_contents(stated) and not SEEING.isdisjoint(stated) for stated in _stated(text))


def _stated(text: str) -> Iterator[list[str]]:
    """Yield of each sentence the words that it states."""
    for sentence in _SENTENCE.split(text):
        spoken = normalise(sentence).split()
        if ABSTAINING.isdisjoint(spoken):
            denial = next((place for place, word in enumerate(spoken) if word in DENYING), len(spoken))
            yield spoken[:denial]


def _contents(stated: list[str]) -> list[str]:
    return [word for word in stated if word not in FILLING and word not in SEEING]
