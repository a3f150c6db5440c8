"""Estimate the time left in a run: steps, and the evaluations that follow them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

WINDOW = 30
"""Recent steps to estimate from: early steps are slower, and pauses are forgotten."""


class TimeLeft:
    """Estimate seconds left from recent steps, and from the latest evaluation's time per answer.

    Times are seconds of any monotonic clock.

    Example:
        >>> left = TimeLeft()
        >>> left.evaluated(seconds=36.0, answers=3600)
        >>> left.start(total=100, done=0, now=0.0, evaluations={100: 3600})
        >>> left.step(1, now=2.0)
        >>> left.seconds()
        234.0
    """

    def __init__(self) -> None:
        """Know of no step or evaluation yet."""
        self._total = 0
        self._times: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)
        self._evaluations: dict[int, int] = {}
        self._per_answer: float | None = None
        self._evaluating_s = 0.0

    def start(self, total: int, done: int, now: float, evaluations: Mapping[int, int]) -> None:
        """Begin counting steps.

        Args:
            total: steps of the run.
            done: those done already.
            now: the time.
            evaluations: number of answers by the step they come after, for all still to come.
        """
        self._total, self._evaluations, self._evaluating_s = total, dict(evaluations), 0.0
        self._times.clear()
        self._times.append((done, now))

    def step(self, step: int, now: float) -> None:
        """Count a finished step; evaluations since the last one do not count as its time."""
        self._times.append((step, now - self._evaluating_s))

    def evaluated(self, seconds: float, answers: int, step: int = 0) -> None:
        """Learn from an evaluation after `step` how long an answer takes, and count it as done."""
        if answers:
            self._per_answer = seconds / answers
        self._evaluating_s += seconds
        self._evaluations.pop(step, None)

    def answering(self, answers: int) -> float | None:
        """Return the seconds that so many answers take; None before the first evaluation."""
        return None if self._per_answer is None else answers * self._per_answer

    @property
    def answers(self) -> int:
        """Evaluation answers still to come."""
        return sum(self._evaluations.values())

    @property
    def is_whole(self) -> bool:
        """Whether `seconds` has the evaluations, if any are to come."""
        return self._per_answer is not None or not self.answers

    def seconds(self) -> float | None:
        """Return the seconds left; None before the first step."""
        if len(self._times) < 2:
            return None
        (first, begin), (last, end) = self._times[0], self._times[-1]
        steps = (end - begin) / max(1, last - first) * max(0, self._total - last)
        return steps + (self.answering(self.answers) or 0.0)
