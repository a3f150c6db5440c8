"""Reports: free text beside one or several references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlmed.core.types import IntArray
from rlmed.tasks.base import TEMPLATE, ImageSize, Task, texts_of
from rlmed.tasks.metrics.overlap import bleu, bleu_counts, bleu_of, rouge_l
from rlmed.tasks.metrics.text import token_f1


class Report(Task):
    """A report; truth: `{"references": [text, …]}`.

    Overlap with a reference says how alike the words are, not whether the findings are right. An
    answer counts as right from a ROUGE-L of 0.5 on, a convention of ours.
    """

    name = "report"
    template = TEMPLATE.format(instruction="provide the report")
    main = "rouge_l"
    threshold = 0.5
    score_names = ("rouge_l", "bleu", "f1")
    needs_image = True

    def read(self, answer: Any, options: Sequence[str], size: ImageSize) -> Any:
        """Return the references."""
        if options:
            raise ValueError("it has options, and its task is report: leave them out, or the task")
        return {"references": texts_of(answer)}

    def write(self, truth: Any) -> str:
        """Return the first reference."""
        return str(truth["references"][0])

    def score(self, answer: str, truth: Any) -> Mapping[str, float] | None:
        """Return ROUGE-L and BLEU of the report and F1 of its tokens, best over the references."""
        references = truth["references"]
        return {
            "rouge_l": rouge_l(answer, references),
            "bleu": bleu(answer, references),
            "f1": token_f1(answer, references),
        }

    def reads(self, answer: str, truth: Any) -> bool:
        """Return True: a report is any text."""
        return True

    def over_file(self, answers: Sequence[tuple[str | None, Any]]) -> Mapping[str, float]:
        """Return BLEU over the file."""
        return {"corpus_bleu": bleu_of(_counts(answers).sum(axis=0))}

    def over_resamples(
        self, answers: Sequence[tuple[str | None, Any]], draws: IntArray
    ) -> Mapping[str, Sequence[float]]:
        """Return `over_file` of each draw of rows; word sequences are counted once."""
        counts = _counts(answers)
        return {"corpus_bleu": [bleu_of(counts[rows].sum(axis=0)) for rows in draws]}


def _counts(answers: Sequence[tuple[str | None, Any]]) -> IntArray:
    return bleu_counts([answer or "" for answer, _ in answers], [truth["references"] for _, truth in answers])
