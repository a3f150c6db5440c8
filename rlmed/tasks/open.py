"""Open questions: an answer in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rlmed.tasks.base import TEMPLATE, ImageSize, Task, texts_of
from rlmed.tasks.metrics.quantities import close, parse_quantity
from rlmed.tasks.metrics.text import exact_match, normalise, recall, token_f1

TOLERANCE = 0.05
"""Relative difference up to which a quantity is right."""


class Open(Task):
    """An answer in words or a quantity; truth: `{"answers": [accepted text, …]}`.

    It is right if it equals an accepted answer after normalisation, or is the same quantity within
    5 %, in whatever unit; a number without a unit must be the same.
    """

    name = "open"
    template = TEMPLATE.format(instruction="provide the answer in a few words")
    main = "exact"
    score_names = ("exact", "f1", "recall")

    def read(self, answer: Any, options: Sequence[str], size: ImageSize) -> Any:
        """Return the accepted answers."""
        if options:
            raise ValueError("it has options, and its task is open: leave them out, or the task")
        return {"answers": texts_of(answer)}

    def write(self, truth: Any) -> str:
        """Return the first accepted answer."""
        return str(truth["answers"][0])

    def score(self, answer: str, truth: Any) -> Mapping[str, float] | None:
        """Return exact match, F1 and recall of tokens, the best over the accepted answers."""
        accepted = truth["answers"]
        if meant := self._meant(answer):
            accepted, answer = [*accepted, *map(self._meant, accepted)], meant
            accepted = [text for text in accepted if text]
        exact = max(exact_match(answer, accepted), *(_same_quantity(answer, reference) for reference in accepted))
        return {
            "exact": exact,
            "f1": max(exact, token_f1(answer, accepted)),
            "recall": max(exact, recall(answer, accepted)),
        }

    def _meant(self, text: str) -> str | None:
        """Return the canonical text of a spelling in the file of synonyms; None without one."""
        if not self.synonyms:
            return None
        return _normalised(tuple(self.synonyms.items())).get(normalise(text))


@lru_cache(maxsize=4)
def _normalised(synonyms: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    """Return canonical texts by normalised spelling; a canonical text is a spelling of itself."""
    labels = {normalise(label): label for _, label in synonyms}
    return labels | {normalise(spelling): label for spelling, label in synonyms}


def _same_quantity(answer: str, reference: str) -> float:
    """Return 1 if both are the same quantity, else 0; a bare number may be a count: exact."""
    right = parse_quantity(reference)
    if right is None or parse_quantity(answer) is None:
        return 0.0
    return close(answer, reference, TOLERANCE if right.unit or right.spread else 0.0)
