"""Labels: which of several findings are there, none to all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rlmed.core.spelling import shorten
from rlmed.core.types import Example, IntArray
from rlmed.tasks.base import TEMPLATE, ImageSize, Task, columns
from rlmed.tasks.metrics.label_counts import LabelCounts
from rlmed.tasks.metrics.sets import macro_scores, micro_scores, parse_set, set_f1

NONE = "none"
"""The answer if no label applies."""
_Sets = tuple[Sequence[str], Sequence[str]]


class Labels(Task):
    """Several labels; truth: `{"labels": [right one, …], "known": [possible one, …]}`.

    `known` is empty where the question does not list what is possible. An answer is right if it
    names exactly the right labels.
    """

    name = "labels"
    template = TEMPLATE.format(
        instruction="provide all findings that apply, separated by commas ('none' if none does),"
    )
    main = "f1"
    score_names = ("f1", "exact")
    placeholder: ClassVar[list[Any]] = []

    def read(self, answer: Any, options: Sequence[str], size: ImageSize) -> Any:
        """Return right and possible labels."""
        if not isinstance(answer, list) or not all(isinstance(label, str) and label.strip() for label in answer):
            raise ValueError(f"its answer is {shorten(answer)}: write a list of the labels that apply, [] for none")
        labels = [label.strip() for label in answer]
        if len({label.casefold() for label in labels}) < len(labels):
            raise ValueError(f"its answer {shorten(answer)} names a label twice")
        possible = {option.casefold() for option in options}
        if len(possible) < len(options):
            raise ValueError(f"its options {shorten(list(options))} name a label twice")
        if NONE in possible:
            raise ValueError(f"one of its options is {NONE!r}, which means that no label applies: leave it out")
        if unknown := [label for label in labels if possible and label.casefold() not in possible]:
            raise ValueError(f"its answer has {shorten(unknown[0])}, which is none of its options")
        return {"labels": labels, "known": list(options)}

    def write(self, truth: Any) -> str:
        """Return the right labels, in their order."""
        return ", ".join(truth["labels"]) or NONE

    def score(self, answer: str, truth: Any) -> Mapping[str, float] | None:
        """Return F1 of the named labels, and whether they are exactly the right; None if blank."""
        if not answer.strip():  # to say nothing is not to say that there is nothing
            return None
        named, right = self._sets(answer, truth)
        return {"f1": set_f1(named, right), "exact": float({*named} == {*right})}

    def over_file(self, answers: Sequence[tuple[str | None, Any]]) -> Mapping[str, float]:
        """Return F1 over all labels of all rows (micro), and the mean over labels (macro)."""
        return _figures(*self._rows(answers))

    def over_resamples(
        self, answers: Sequence[tuple[str | None, Any]], draws: IntArray
    ) -> Mapping[str, Sequence[float]]:
        """Return `over_file` of each draw of rows; labels are read and counted once."""
        return columns(map(LabelCounts.of(*self._rows(answers)).figures, draws))

    def _rows(self, answers: Sequence[tuple[str | None, Any]]) -> tuple[list[_Sets], list[Sequence[str]]]:
        """Return each row's named and right labels, and those that are possible."""
        return [self._sets(answer or "", truth) for answer, truth in answers], [truth["known"] for _, truth in answers]

    def sets(self, answer: str, truth: Any) -> tuple[Sequence[str], Sequence[str]]:
        """Return the labels that an answer names, and the right ones, in the same spelling."""
        return self._sets(answer, truth)

    def _sets(self, answer: str, truth: Any) -> tuple[Sequence[str], Sequence[str]]:
        """Return the labels that an answer names, and the right ones, in the same spelling."""
        known = truth["known"] or truth["labels"]
        right = parse_set("\n".join(truth["labels"]), known, self.synonyms) if truth["labels"] else ()
        return parse_set(answer, known, self.synonyms), right

    def explain(self, answer: str, truth: Any, size: ImageSize) -> str:
        """Return the named labels that are none of the possible ones; "" without any."""
        named, _ = self._sets(answer, truth)
        outside = [label for label in named if truth["known"] and label not in truth["known"]]
        part = "" if len(outside) == len(named) else "partly "
        return f"{part}outside of the options: {', '.join(outside)}" if outside else ""

    def same(self, first: str, second: str, truth: Any, second_truth: Any = None) -> bool:
        """Return whether both name the same labels."""
        return {*self._sets(first, truth)[0]} == {*self._sets(second, truth)[0]}

    def asserts(self, answer: str, truth: Any, options: Sequence[str]) -> bool | None:
        """Return whether the answer names any label."""
        return bool(self._sets(answer, truth)[0])

    def question_text(self, example: Example) -> str:
        """Return the question, then the possible labels in a line."""
        known = example.truth["known"]
        return f"{example.question}\n{', '.join(known)}" if known else example.question


def _figures(rows: Sequence[_Sets], known: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return micro F1, and macro F1 if any label has one."""
    possible = {label for labels in known for label in labels} or None
    found = {"micro_f1": micro_scores(rows).f1}
    seen = {label for named, right in rows for label in (*named, *right)}
    if seen & (possible or seen):  # else no label has a figure
        found["macro_f1"] = macro_scores(rows, possible).f1
    return found
