"""Overlap of a text with references: BLEU by sacrebleu, ROUGE-L by rouge-score, from 0 to 1.

BLEU is Post 2018 (arXiv 1804.08771), ROUGE-L Lin 2004 (ACL workshop Text Summarization Branches
Out). Both count words alike, not whether findings are right. Where a reference has Chinese or
Japanese, each character is a word: BLEU takes sacrebleu's tokenizer "zh", ROUGE-L `tokens`;
otherwise the libraries' own. Both libraries are in the extra `metrics`, imported when first needed.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from rlmed.core.types import IntArray
from rlmed.tasks.metrics.text import WITHOUT_SPACES, tokens

INSTALL = "pip install -c requirements.lock -e '.[metrics]' in rlmed's checkout"

NGRAMS = 4
"""Words of the longest sequences that BLEU counts."""
_CHARACTER = re.compile(f"[{WITHOUT_SPACES}]")


def bleu(answer: str, references: str | Sequence[str]) -> float:
    """Return the sentence's BLEU against all references at once, from 0 to 1.

    sacrebleu's with effective order and its default smoothing, divided by 100.

    Args:
        references: one text or several accepted ones.

    Example:
        >>> round(bleu("no acute fracture", ["no acute fracture", "no fracture"]), 6)
        1.0

    Raises:
        ValueError: without references, or if sacrebleu is not installed.
    """
    references = _listed(references)
    score = _bleu(_tokenizer(references), True).sentence_score(answer, references)
    return _fraction(score.score)


def corpus_bleu(answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """Return BLEU over all answers, from 0 to 1: sacrebleu's default, divided by 100.

    Args:
        answers: one for each row.
        references: those of each row, one text or several; rows may differ in their number.

    Example:
        >>> round(corpus_bleu(["no acute fracture is seen"], [["no acute fracture is seen", "none"]]), 6)
        1.0

    Raises:
        ValueError: see `bleu_counts`.
    """
    return bleu_of(bleu_counts(answers, references).sum(axis=0))


def bleu_counts(answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> IntArray:
    """Return what BLEU needs of each row, int64 [rows, 10], to be summed for `bleu_of`.

    They are the sequences of 1 to 4 words that answer and reference share, those that the answer
    has, the answer's words, and those of the reference nearest in length.

    Args:
        answers: one for each row.
        references: those of each row, as for `corpus_bleu`.

    Raises:
        ValueError: without answers, if a row has no references or the numbers differ, or if
            sacrebleu is not installed.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(
            f"{len(answers)} answers and {len(references)} rows of references: give one row for each, at least one"
        )
    rows = [_listed(row) for row in references]
    metric = _bleu(_tokenizer(text for row in rows for text in row), True)
    scores = [metric.sentence_score(answer, row) for answer, row in zip(answers, rows, strict=True)]
    return np.array([(*one.counts, *one.totals, one.sys_len, one.ref_len) for one in scores], dtype=np.int64)


def bleu_of(counts: IntArray) -> float:
    """Return BLEU, from 0 to 1, of the sum of some rows' `bleu_counts`, int64 [10].

    Equal to `corpus_bleu` of these rows.

    Raises:
        ValueError: if sacrebleu is not installed.
    """
    right, written, (length, reference) = np.split(counts, (NGRAMS, 2 * NGRAMS))
    metric = _bleu("13a", False)
    score = metric.compute_bleu(right.tolist(), written.tolist(), int(length), int(reference), metric.smooth_method)
    return _fraction(score.score)


def rouge_l(answer: str, references: str | Sequence[str]) -> float:
    """Return the best F1 of the longest common subsequence of words over references, from 0 to 1.

    rouge-score's rougeL without stemming.

    Args:
        references: one text or several accepted ones.

    Example:
        >>> rouge_l("no acute fracture", ["no fracture", "acute pneumonia"])
        0.8

    Raises:
        ValueError: without references, or if rouge-score is not installed.
    """
    references = _listed(references)
    scorer = _rouge(_tokenizer(references) == "zh")
    return max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in references)


def _listed(references: str | Sequence[str]) -> list[str]:
    texts = [references] if isinstance(references, str) else list(references)
    if not texts:
        raise ValueError("references=[] leaves nothing to compare the answer with: give at least one text")
    return texts


def _tokenizer(references: Iterable[str]) -> str:
    """Return the name of sacrebleu's tokenizer for these references."""
    return "zh" if any(_CHARACTER.search(reference) for reference in references) else "13a"


def _fraction(percent: float) -> float:
    return min(percent / 100, 1.0)  # a perfect score is 100 but for rounding


@lru_cache
def _bleu(tokenizer: str, sentence: bool) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ValueError(f"BLEU needs sacrebleu: {INSTALL}") from error
    return BLEU(tokenize=tokenizer, effective_order=sentence)


@lru_cache
def _rouge(by_character: bool) -> Any:
    try:
        from absl.logging import get_absl_handler
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError(f"ROUGE needs rouge-score: {INSTALL}") from error
    # its handler closes the stream that was sys.stderr now, if it no longer is when logging ends
    get_absl_handler().python_handler.setStream(sys.__stderr__)
    logging.getLogger("absl").setLevel(logging.WARNING)  # it says which tokenizer it uses
    return RougeScorer(["rougeL"], tokenizer=_Characters() if by_character else None)


class _Characters:
    """A tokenizer as rouge-score takes it."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)
