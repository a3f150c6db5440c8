"""Rewards that take time: how a function is marked as one, what it may raise, and its limits.

`rewards.slow_reward` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rewards.deadline import call_within
from rlmed.core.types import Completion, Example

BatchCall = Callable[[Sequence[Example], Sequence[Completion]], Sequence[object]]
"""Scores several completions in one call; entries i of arguments and result go together."""
ON_FAILURE = ("stop", "missing")


class TimedCall(Protocol):
    """A `BatchCall` that raises `rewards.deadline.DeadlineError` after so many seconds."""

    def __call__(
        self,
        seconds: float,
        examples: Sequence[Example],
        completions: Sequence[Completion],
        begun: Callable[[], None],
        /,
    ) -> Sequence[object]:
        """Call `begun` when the time runs: a wait for what computes is no part of it."""
        ...


Function = TypeVar("Function", bound=Callable[..., Any])
_DECLARED: dict[Callable[..., Any], dict[str, Any]] = {}


class RewardUnavailableError(Exception):
    """A slow reward could not be had this time: raised by its function, for a retry."""

    def __init__(self, message: str, *, again: bool = True, after_s: float = 0.0, answered: bool = False) -> None:
        """Say why.

        Args:
            message: what went wrong.
            again: False where a retry is useless.
            after_s: the shortest pause before one.
            answered: True where only this answer is of no use: other calls may well succeed.
        """
        super().__init__(message)
        self.again, self.after_s, self.answered = again, after_s, answered


class Noted(float):
    """A reward with a text that the cache keeps beside it, as a judge's words."""

    note: str

    def __new__(cls, value: float, note: str) -> Noted:
        """Return `value` with its note."""
        noted = super().__new__(cls, value)
        noted.note = note
        return noted

    def __getnewargs__(self) -> tuple[float, str]:  # type: ignore[override]
        """Return what makes it again, in another process."""
        return float(self), self.note


def in_thread(call: BatchCall) -> TimedCall:
    """Return a call that is made here, in a thread that is abandoned at the time limit."""

    def timed(
        seconds: float, examples: Sequence[Example], completions: Sequence[Completion], begun: Callable[[], None], /
    ) -> Sequence[object]:
        begun()
        return call_within(seconds, lambda: list(call(examples, completions)))

    return timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How a slow reward is called; see `reward.slow` in `conf/`."""

    batch_size: int | None
    """Most completions of a call; None for a function of one."""
    concurrency: int
    timeout_s: float
    retries: int
    wait_s: float
    """Pause before the first retry, about doubled each time."""
    max_calls: int | None
    max_seconds: float | None
    """Most seconds of all calls together, without waits for a free process or before a retry."""
    on_failure: str


def slow(
    *,
    batch_size: int | None = None,
    concurrency: int | None = None,
    timeout_s: float | None = None,
    retries: int | None = None,
    max_calls: int | None = None,
    max_seconds: float | None = None,
    on_failure: str | None = None,
) -> Callable[[Function], Function]:
    """Mark a function of `reward.extra` as slow: it is called in threads, its results are cached.

    Args:
        batch_size: most completions of a call. With it the function is called as
            f(examples, completions) and returns a number for each; without, as
            f(example, completion).
        concurrency: most calls at a time.
        timeout_s: time limit of a call, in seconds.
        retries: calls after one that raised or took too long.
        max_calls: most calls of a run.
        max_seconds: most seconds that the calls of a run may take together.
        on_failure: "stop" or "missing", when all attempts have failed.

    What is left out is as in `reward.slow` and `reward.timeout_s`.

    Example:
        >>> @slow(batch_size=8)
        ... def lengths(examples, completions):
        ...     return [len(completion.text) for completion in completions]
    """
    given = {name: value for name, value in locals().items() if value is not None}
    for name in ("batch_size", "concurrency", "timeout_s", "max_calls", "max_seconds"):
        if name in given and not given[name] > 0:
            raise ValueError(f"slow({name}={given[name]}): give a positive number")
    if given.get("retries", 0) < 0:
        raise ValueError(f"slow(retries={retries}): give 0 or more")
    if on_failure not in (None, *ON_FAILURE):
        raise ValueError(f"slow(on_failure={on_failure!r}): give one of {', '.join(ON_FAILURE)}")

    def mark(function: Function) -> Function:
        _DECLARED[function] = given
        return function

    return mark


def declared(function: Callable[..., Any]) -> Mapping[str, Any] | None:
    """Return the arguments of the `slow` that marks a function; None if none does."""
    return _DECLARED.get(function)
