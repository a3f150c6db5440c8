"""Slow rewards: asked for in threads while the run goes on, in batches, within limits."""

from __future__ import annotations

import functools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewards.cache import RewardCache, key_of
from rewards.deadline import DeadlineError
from rewards.extra import RewardError, finite_number
from rewards.failures import FailureShare
from rewards.slow import Limits, Noted, RewardUnavailableError, TimedCall
from rewards.workers import Workers
from rlmed.core.files.atomic import RecordError
from rlmed.core.types import Completion, Example, FloatArray, RolloutGroup

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 300.0
"""Longest pause before a retry, whatever a server asks for."""
HUNG_CALLS = 4
"""Calls that may hang, for each of those that go on at a time, before the run stops."""


class _FailedError(Exception):
    """All attempts of a call have failed."""


class _SpentError(_FailedError):
    """The run's budget is spent: there is no attempt."""


@dataclass(slots=True)
class _Asked:
    """A completion whose reward is being asked for."""

    key: str
    completion: Completion
    result: Future[float] = field(default_factory=Future)


class SlowReward:
    """A `rewards.base.GroupReward` whose calls go on in threads from `begin` on.

    Results are those of the cache where it has them, and one call serves equal texts. What calls
    return does not depend on when they return, so a run's numbers don't either.
    """

    def __init__(
        self,
        name: str,
        call: TimedCall,
        limits: Limits,
        cache: RewardCache | None,
        *,
        settings: Mapping[str, Any],
        keys: Mapping[str, str],
        known: Callable[[Example, Completion], float | None] = lambda example, completion: None,
    ) -> None:
        """Start nothing yet.

        Args:
            name: of the reward.
            call: called with up to `limits.batch_size` completions of a group.
            limits: how.
            cache: of the run; None calls again each time.
            settings: what its values depend on, besides example and text, of JSON's types.
            keys: the configuration key of each field of `limits`, for messages.
            known: the reward of a completion that needs no call, else None.
        """
        self.name, self.limits = name, limits
        self._call, self._cache, self._settings, self._keys, self._known = call, cache, settings, keys, known
        self._workers = Workers(limits.concurrency, f"reward {name}")
        self._lock = threading.RLock()
        self._begun: dict[int, list[Future[float]]] = {}
        self._asked: dict[str, Future[float]] = {}
        self._calls, self._seconds = (0, 0.0) if cache is None else cache.spent(name)
        self._read_seconds = self._seconds
        self._hung: list[threading.Thread] = []
        self._down = False
        """True after a call failed for good: the next ones get one attempt."""
        self._error: Exception | None = None
        self._failures = FailureShare(name)
        self._warned: set[type[_FailedError]] = set()
        self._random = random.Random()

    def begin(self, group: RolloutGroup) -> None:
        """Ask for a group's rewards without waiting; from any thread, and raises nothing."""
        with self._lock:
            index = group.request.index
            if index not in self._begun:
                try:
                    self._begun[index] = self._ask(group)
                except Exception as error:  # raised where the group is scored
                    self._begun[index] = [_failed(error)]

    def __call__(self, group: RolloutGroup) -> FloatArray:
        """Wait for a group's rewards; float32 [G], NaN where one is missing.

        Raises:
            RewardError: if a call failed and `on_failure` is "stop", or returned no finite numbers.
        """
        return self.with_notes(group)[0]

    def with_notes(self, group: RolloutGroup) -> tuple[FloatArray, tuple[str, ...]]:
        """Wait as a call does; return also the text beside each reward, "" where there is none."""
        self.begin(group)
        with self._lock:
            results = self._begun.pop(group.request.index)
        values = [result.result() for result in results]
        notes = tuple(value.note if isinstance(value, Noted) else "" for value in values)
        return np.array(values, dtype=np.float32), notes

    def read_seconds(self) -> float:
        """Return the seconds that calls took since the last reading, those at one time added up."""
        with self._lock:
            taken, self._read_seconds = self._seconds - self._read_seconds, self._seconds
        return taken

    def close(self) -> None:
        """Drop what is not asked for yet."""
        self._workers.close()

    def _ask(self, group: RolloutGroup) -> list[Future[float]]:
        """Queue the calls that a group needs; return its results in order."""
        example = group.prompt.example
        known = [self._known(example, completion) for completion in group.completions]
        keys = [
            key_of(self.name, self._settings, example, completion.text) if value is None else ""
            for completion, value in zip(group.completions, known, strict=True)
        ]
        results, fresh = [], []
        for completion, value, key in zip(group.completions, known, keys, strict=True):
            if value is None and self._cache is not None and (value := self._cache.get(key)) is not None:
                value = Noted(value, self._cache.note(key))
            if value is not None:
                results.append(_done(value))
                continue
            if key not in self._asked:
                fresh.append(_Asked(key, completion))
                self._asked[key] = fresh[-1].result
            results.append(self._asked[key])
        for batch in _batches(fresh, self.limits):
            self._workers.add(group.request.index, functools.partial(self._serve, example, batch))
        return results

    # Everything below runs in the workers.

    def _serve(self, example: Example, batch: Sequence[_Asked]) -> None:
        try:
            values = self._values(example, batch)
        except Exception as error:  # raised where the group is scored
            self._error = self._error or error
            self._forget(batch)
            for entry in batch:
                entry.result.set_exception(error)
        else:
            self._forget(batch)
            for entry, value in zip(batch, values, strict=True):
                entry.result.set_result(value)

    def _forget(self, batch: Sequence[_Asked]) -> None:
        with self._lock:
            for entry in batch:
                del self._asked[entry.key]

    def _values(self, example: Example, batch: Sequence[_Asked]) -> list[float]:
        """Return a batch's rewards, NaN if they are missing."""
        if self._error is not None:
            raise self._error
        try:
            return self._attempts(example, batch)
        except _FailedError as failed:
            what = f"reward {self.name} on example {example.id!r}: {failed}"
            if self.limits.on_failure == "stop":
                raise RewardError(
                    f"{what}. Mend this and continue with resume=auto; {self._keys['on_failure']}=missing would leave the "
                    "reward out of the groups that lack it"
                ) from failed
            self._warn_once(type(failed), what)
            return [math.nan] * len(batch)

    def _warn_once(self, kind: type[_FailedError], what: str) -> None:
        """Warn of the first reward that is missing; the metrics count all, `FailureShare` often."""
        with self._lock:
            level = logging.DEBUG if kind in self._warned else logging.WARNING
            self._warned.add(kind)
        log.log(level, "%s: it counts as missing, as further ones do: reward/%s_missing", what, self.name)

    def _attempts(self, example: Example, batch: Sequence[_Asked]) -> list[float]:
        last = 0 if self._down else self.limits.retries
        why = ""
        for attempt in range(last + 1):
            self._take_from_budget()
            pause, again, answered = 0.0, True, False
            try:
                values = self._attempt(example, batch)
            except DeadlineError as error:
                why = f"no result after {self.limits.timeout_s:g} s ({self._keys['timeout_s']})"
                self._count_hung(error.thread)
            except (RewardError, RecordError):
                raise
            except RewardUnavailableError as error:
                why, pause, again, answered = str(error), error.after_s, error.again, error.answered
            except (Exception, SystemExit) as error:  # a user's function may raise anything
                why = f"it raised {type(error).__name__}: {error}"
            else:
                self._down = False
                self._failures.note(None)
                return values
            self._failures.note(why)
            if not again or attempt == last:
                break
            doubled = self.limits.wait_s * 2**attempt * self._random.uniform(0.5, 1.0)
            if self._workers.closing.wait(min(max(doubled, pause), LONGEST_WAIT_S)):
                raise _FailedError(f"{why}, and the run ends")
        self._down = self._down or (again and not answered)
        raise _FailedError(why if attempt == 0 else f"{why}, the last of {attempt + 1} attempts")

    def _attempt(self, example: Example, batch: Sequence[_Asked]) -> list[float]:
        """Call once; what that took is kept whether it fails or not, so that a resume knows it."""
        begun: list[float] = []
        values: list[float] = []
        completions = [entry.completion for entry in batch]
        try:
            returned = self._call(
                self.limits.timeout_s, [example] * len(batch), completions, lambda: begun.append(time.perf_counter())
            )
            values = self._checked(returned, batch)
        finally:
            # a call that never got a process took nothing
            seconds = time.perf_counter() - begun[0] if begun else 0.0
            with self._lock:
                self._seconds += seconds
            self._keep(batch if values else (), values, seconds)
        return values

    def _checked(self, returned: Sequence[object], batch: Sequence[_Asked]) -> list[float]:
        if len(returned) != len(batch):
            raise RewardError(f"reward {self.name}: it returned {len(returned)} numbers for {len(batch)} completions")
        numbers = [finite_number(value, f"reward {self.name}") for value in returned]
        return [value if isinstance(value, Noted) else number for value, number in zip(returned, numbers, strict=True)]

    def _keep(self, batch: Sequence[_Asked], values: Sequence[float], seconds: float) -> None:
        if self._cache is not None:
            pairs = list(zip([entry.key for entry in batch], values, strict=True))
            notes = {key: value.note for key, value in pairs if isinstance(value, Noted)}
            own = {key: float(value) for key, value in pairs}
            self._cache.add(self.name, own, calls=1, seconds=seconds, notes=notes)

    def _take_from_budget(self) -> None:
        limits = self.limits
        with self._lock:
            if limits.max_calls is not None and self._calls >= limits.max_calls:
                raise _SpentError(f"the run's {limits.max_calls} calls are spent ({self._keys['max_calls']})")
            if limits.max_seconds is not None and self._seconds >= limits.max_seconds:
                raise _SpentError(f"the run's {limits.max_seconds:g} s are spent ({self._keys['max_seconds']})")
            self._calls += 1

    def _count_hung(self, thread: threading.Thread | None) -> None:
        """Note a call that was given up; raise RewardError if too many of them never end."""
        with self._lock:
            self._hung = [entry for entry in (*self._hung, thread) if entry is not None and entry.is_alive()]
            if len(self._hung) > HUNG_CALLS * self.limits.concurrency:
                raise RewardError(
                    f"reward {self.name}: {len(self._hung)} calls that took longer than {self.limits.timeout_s:g} s still "
                    f"hang: give its own calls a time limit, or raise {self._keys['timeout_s']}"
                )


def _batches(asked: Sequence[_Asked], limits: Limits) -> list[Sequence[_Asked]]:
    size = limits.batch_size or 1
    return [asked[start : start + size] for start in range(0, len(asked), size)]


def _done(value: float) -> Future[float]:
    result: Future[float] = Future()
    result.set_result(value)
    return result


def _failed(error: Exception) -> Future[float]:
    result: Future[float] = Future()
    result.set_exception(error)
    return result
