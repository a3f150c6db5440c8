"""Compute the figures of reliability from answers; pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from rlmed.core.calibration import (
    Estimate,
    brier_score,
    calibrated_error_bound,
    calibration_error,
    pass_at_k,
    reliability_bins,
)
from rlmed.core.prefill import ANSWER
from rlmed.core.statistics import mcnemar
from rlmed.core.types import LETTERS, Example
from rlmed.evaluation.records import Accuracy, Control, EvalRow
from rlmed.evaluation.reliability.results import (
    Agreement,
    Calibration,
    Domain,
    Gap,
    LetterBias,
    OrderAnswer,
    OrderSensitivity,
    PassAtK,
    QuestionAnswers,
    Reliance,
    Sampling,
)

Argued = Callable[[str, tuple[str, ...]], int | None]
"""Return the index of the option argued for, from reasoning and options; None if unclear."""


def calibration(probabilities: Sequence[tuple[float, ...]], answers: Sequence[str]) -> Calibration | None:
    """Return the calibration of the most likely option; None without questions.

    Args:
        probabilities: probabilities of each question's options.
        answers: right letters.
    """
    if not probabilities:
        return None
    confidence = np.array([max(entry) for entry in probabilities])
    indices = [LETTERS.index(letter) for letter in answers]
    correct = np.array([int(np.argmax(entry)) == index for entry, index in zip(probabilities, indices, strict=True)])
    scores = [brier_score(np.array(entry), index) for entry, index in zip(probabilities, indices, strict=True)]
    return Calibration(
        accuracy=Accuracy.of(int(correct.sum()), len(correct)),
        confidence=Estimate.mean(confidence),
        error=Estimate.of(lambda rows: calibration_error(confidence[rows], correct[rows]), len(correct)),
        error_bound=calibrated_error_bound(confidence),
        brier=Estimate.mean(scores, bounds=(0.0, 2.0)),
        bins=reliability_bins(confidence, correct),
    )


def sampling(answers: Sequence[QuestionAnswers]) -> Sampling:
    """Return pass@k, for powers of two up to the sample count and for it, and the majority vote."""
    samples = len(answers[0].samples)
    correct = [answer.samples.count(answer.answer) for answer in answers]
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
    return Sampling(
        samples=samples,
        passes=tuple(PassAtK(k, Estimate.mean([pass_at_k(samples, count, k) for count in correct])) for k in ks),
        vote=_share([_vote(answer) == answer.answer for answer in answers]),
    )


def _vote(answer: QuestionAnswers) -> str | None:
    """Return the majority letter; samples without a letter among the options do not vote."""
    letters = LETTERS[: len(answer.direct)]
    # ties go to the letter met first
    votes = Counter(letter for letter in answer.samples if letter is not None and letter in letters).most_common(1)
    return votes[0][0] if votes else None


def order_sensitivity(answers: Sequence[QuestionAnswers]) -> OrderSensitivity:
    """Return how answers depend on option order; letters' intervals are over questions only."""
    texts = [{_chosen(entry) for entry in answer.orders} for answer in answers]
    letters = LETTERS[: max(len(answer.direct) for answer in answers)]
    return OrderSensitivity(
        stays=_share([len(found) == 1 and None not in found for found in texts]),
        orders=tuple(
            _share([entry.correct for entry in order]) for order in zip(*(a.orders for a in answers), strict=True)
        ),
        letters=tuple(_letter_bias(letter, answers) for letter in letters),
    )


def _chosen(entry: OrderAnswer) -> str | None:
    """Return the text of the chosen option; None if the answer names none."""
    if entry.predicted_letter is None or entry.predicted_letter not in LETTERS[: len(entry.options)]:
        return None
    return entry.options[LETTERS.index(entry.predicted_letter)]


def _letter_bias(letter: str, answers: Sequence[QuestionAnswers]) -> LetterBias:
    having = [answer.orders for answer in answers if LETTERS.index(letter) < len(answer.direct)]
    chosen = [sum(entry.predicted_letter == letter for entry in orders) for orders in having]
    there = [sum(entry.answer == letter for entry in orders) for orders in having]
    hits = [sum(entry.answer == entry.predicted_letter == letter for entry in orders) for orders in having]
    totals = [len(orders) for orders in having]
    return LetterBias(
        letter=letter,
        chosen=Estimate.ratio(chosen, totals),
        correct=sum(there) / sum(totals),
        accuracy=Estimate.ratio(hits, there) if any(there) else None,
    )


def reliance(rows: Sequence[EvalRow]) -> tuple[Reliance, ...]:
    """Return reliance on the picture for a file's rows (with controls), then by question type."""
    types = sorted({row.question_type for row in rows if row.question_type})
    groups = [("", rows), *((name, [row for row in rows if row.question_type == name]) for name in types)]
    return tuple(
        Reliance(
            question_type=name,
            real=_share([row.correct for row in part if row.control == "none"]),
            blank=_gap(part, "blank"),
            shuffled=_gap(part, "shuffled"),
        )
        for name, part in groups
    )


def _gap(rows: Sequence[EvalRow], control: Control) -> Gap | None:
    own = {row.id: row.correct for row in rows if row.control == "none"}
    pairs = [(own[row.id], row.correct) for row in rows if row.control == control]
    if not pairs:
        return None
    real, other = (np.array(side, dtype=bool) for side in zip(*pairs, strict=True))
    return Gap(
        control=_share(other.tolist()),
        difference=Estimate.mean(real.astype(float) - other, bounds=(-1.0, 1.0)),
        p_value=mcnemar(other, real).p_value,
    )


def domains(
    rows: Sequence[EvalRow], answers: Iterable[QuestionAnswers], train: Sequence[Example]
) -> tuple[Domain, ...]:
    """Return the accuracy on trained and other modalities; rows without a modality are left out."""
    trained = {example.modality for example in train if example.modality}
    modality = {(answer.file, answer.id): answer.modality for answer in answers}
    found = []
    for inside in (True, False):
        names = {name for name in modality.values() if name and (name in trained) == inside}
        part = [row for row in rows if modality[row.file, row.id] in names]
        if trained and part:
            shares = [
                [row.correct for row in part if row.control == control] for control in ("none", "blank", "shuffled")
            ]
            real, blank, shuffled = (_share(correct) if correct else None for correct in shares)
            assert real is not None
            found.append(Domain(inside, tuple(sorted(names)), real, blank, shuffled))
    return tuple(found)


def reasoning_agreement(rows: Sequence[EvalRow], argued: Argued) -> Agreement:
    """Return how often the answer is the option that the reasoning argues for.

    Args:
        rows: rows of a file; controls are ignored.
        argued: finds what a reasoning argues for; receives the text before the first answer tag,
            without think tags.
    """
    found = []
    for row in rows:
        if row.control == "none":
            reasoning = row.completion.partition(ANSWER)[0]
            index = argued(reasoning.replace("<think>", "").replace("</think>", "").strip(), row.options)
            found.append((row, None if index is None else LETTERS[index]))
    clear = [(row, letter) for row, letter in found if letter is not None]
    agreeing = [row.correct for row, letter in clear if row.predicted_letter == letter]
    differing = [row.correct for row, letter in clear if row.predicted_letter != letter]
    return Agreement(
        argued=Accuracy.of(len(clear), len(found)),
        agrees=Accuracy.of(len(agreeing), len(clear)) if clear else None,
        correct_if_agreeing=_share(agreeing) if agreeing else None,
        correct_if_differing=_share(differing) if differing else None,
    )


def _share(correct: Sequence[bool]) -> Accuracy:
    return Accuracy.of(sum(correct), len(correct))
