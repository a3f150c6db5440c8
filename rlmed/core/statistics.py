"""Statistics of an accuracy: confidence interval, paired test, and image-free baselines.

All accuracies are fractions in [0, 1]. Everything here is deterministic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from rlmed.core.types import Example, FloatArray

BoolArray = npt.NDArray[np.bool_]


def wilson_interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return a proportion's score interval (Wilson 1927), unlike the normal one good near 0 and 1.

    With p = correct / n and z the normal quantile of (1 + level) / 2, the bounds are
    (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).

    Example:
        >>> [round(bound, 3) for bound in wilson_interval(210, 300)]
        [0.646, 0.749]

    Raises:
        ValueError: without rows, for more correct answers than rows, or for a level outside (0, 1).
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"correct={correct} of n={n} has no interval: expected 0 <= correct <= n and n >= 1")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, for example 0.95")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = correct / n
    centre = share + z * z / (2 * n)
    reach = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at 0 and n correct answers the bound is exact; avoid the rounding error
    low = 0.0 if correct == 0 else (centre - reach) / scale
    high = 1.0 if correct == n else (centre + reach) / scale
    return low, high


@dataclass(frozen=True, slots=True)
class McNemarResult:
    """Two models compared on the same rows.

    Example:
        >>> mcnemar(np.array([True, False, False, True]), np.array([True, True, True, True]))
        McNemarResult(gained=2, lost=0, p_value=0.5)
    """

    gained: int
    """Rows wrong before and correct after."""
    lost: int
    """Rows correct before and wrong after."""
    p_value: float
    """Two-sided, exact."""


def mcnemar(before: BoolArray, after: BoolArray) -> McNemarResult:
    """Run the exact McNemar test (1947): did the share of correct answers change?

    Of n rows whose answer changed, the number gained is binomial(n, 1/2) if nothing changed;
    p = min(1, 2·P(X ≤ min(gained, lost))).

    Args:
        before: bool [N], whether each row was correct.
        after: bool [N], the same rows in the same order.

    Raises:
        ValueError: unless both are flat boolean arrays of equal length.
    """
    for array in (before, after):
        if array.dtype != np.bool_ or array.ndim != 1:
            raise ValueError(f"mcnemar needs flat arrays of bool, got {array.dtype} of shape {array.shape}")
    if before.shape != after.shape:
        raise ValueError(f"mcnemar needs paired rows, got {len(before)} before and {len(after)} after")
    gained = int((~before & after).sum())
    lost = int((before & ~after).sum())
    changed = gained + lost
    # integers up to the one division: no underflow however many rows changed
    tail = sum(comb(changed, k) for k in range(min(gained, lost) + 1))
    return McNemarResult(gained, lost, min(1.0, 2 * tail / 2**changed))


def sign_flip_test(before: FloatArray, after: FloatArray, draws: int = 10_000) -> float:
    """Return the two-sided p-value that the mean of paired scores has not changed.

    A permutation test (Fisher 1935): if nothing changed, each row's difference is as likely with
    the other sign. With k of `draws` random sign patterns at least as extreme as what was found,
    p = (k + 1) / (draws + 1), so it is never 0. Deterministic.

    Args:
        before: float [N], scores of the rows.
        after: float [N], of the same rows in the same order.
        draws: sign patterns.

    Raises:
        ValueError: unless both are flat and of equal length.
    """
    if before.ndim != 1 or before.shape != after.shape:
        raise ValueError(f"sign_flip_test needs paired flat arrays, got shapes {before.shape} and {after.shape}")
    differences = np.asarray(after, np.float64) - before
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    random = np.random.default_rng(0)
    found, extreme, done = abs(differences.sum()), 0, 0
    while done < draws:  # a thousand patterns at a time bound the memory
        count = min(1000, draws - done)
        signs = random.integers(0, 2, size=(count, len(differences)), dtype=np.int8) * 2 - 1
        # of equal sums, rounding must not hide one
        extreme += int((abs(signs @ differences) >= found * (1 - 1e-12)).sum())
        done += count
    return (extreme + 1) / (draws + 1)


@dataclass(frozen=True)
class ImageFreePrior:
    """Baseline that sees only options, no image or question, and picks the most often correct one.

    Example:
        >>> row = Example(id="1", image=None, question="Where?", options=("head", "knee"), answer=1)
        >>> ImageFreePrior.fit([row]).accuracy([row])
        1.0
    """

    correct: Counter[str]
    """How often each option text (stripped, lower-cased) was the correct answer."""
    shown: Counter[str]
    """How often each option text occurred among the options."""

    @classmethod
    def fit(cls, examples: Sequence[Example]) -> ImageFreePrior:
        """Count the option texts of `examples`."""
        correct = Counter(_text(example.options[example.answer]) for example in examples)
        shown = Counter(_text(option) for example in examples for option in example.options)
        return cls(correct, shown)

    def accuracy(self, examples: Sequence[Example], *, by_rate: bool = False) -> float:
        """Return the expected accuracy of picking the best-scored option, ties broken at random.

        Args:
            examples: the rows to answer.
            by_rate: score by correct / shown instead of the count of correct. An option unseen in
                fitting then scores 1 / options: no evidence either way.

        Raises:
            ValueError: without examples.
        """
        return _mean([self._expected(example, self.correct, self.shown, by_rate) for example in examples])

    def leave_one_out(self, examples: Sequence[Example], *, by_rate: bool = False) -> float:
        """Return the accuracy on the fitted rows, each scored by the counts of the others."""
        return _mean([self._expected(example, *self._others(example), by_rate) for example in examples])

    def _others(self, example: Example) -> tuple[dict[str, int], dict[str, int]]:
        """Return the counts of this example's options, excluding this example."""
        texts = [_text(option) for option in example.options]
        here = Counter(texts)
        correct = {text: self.correct[text] - (text == texts[example.answer]) for text in texts}
        return correct, {text: self.shown[text] - here[text] for text in texts}

    @staticmethod
    def _expected(example: Example, correct: dict[str, int], shown: dict[str, int], by_rate: bool) -> float:
        """Return the probability of picking the correct option."""
        texts = [_text(option) for option in example.options]
        scores: list[float] = [correct.get(text, 0) for text in texts]
        if by_rate:
            unmet = 1 / len(texts)
            scores = [
                score / shown[text] if shown.get(text, 0) else unmet for text, score in zip(texts, scores, strict=True)
            ]
        best = max(scores)
        return 1 / scores.count(best) if scores[example.answer] == best else 0.0


def leave_one_out_prior(examples: Sequence[Example], *, by_rate: bool = False) -> float:
    """Return the leave-one-out accuracy of `ImageFreePrior` on `examples`.

    A value well above chance shows that the options leak the answers. If all answers are equally
    frequent it falls below chance, since leaving a row out makes its own answer the rarest: only a
    high value is informative.

    Raises:
        ValueError: without examples.
    """
    return ImageFreePrior.fit(examples).leave_one_out(examples, by_rate=by_rate)


def chance(examples: Sequence[Example]) -> float:
    """Return the accuracy of random guessing, the mean of 1 / options.

    Raises ValueError without examples.
    """
    return _mean([1 / len(example.options) for example in examples])


def majority_letter(examples: Sequence[Example], train: Sequence[Example] = ()) -> float:
    """Return the accuracy on `examples` of always answering one letter.

    Args:
        examples: the rows to answer.
        train: rows that determine the letter, their most frequent correct one (ties: first in the
            alphabet); defaults to `examples`.

    Raises:
        ValueError: without examples.
    """
    counts = Counter(example.letter for example in train or examples)
    favourite = min(counts, key=lambda letter: (-counts[letter], letter), default="")
    return _mean([float(example.letter == favourite) for example in examples])


def _text(option: str) -> str:
    return option.strip().lower()


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("accuracy needs at least one row, got none")
    return float(np.mean(values))
