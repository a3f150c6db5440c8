"""Processes that call reward functions, so that none of them holds up the loop's interpreter."""

from __future__ import annotations

import functools
import logging
import pickle
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from rewards.base import Reward
from rewards.deadline import DeadlineError
from rewards.extra import RewardError, load_reward
from rewards.slow import RewardUnavailableError, TimedCall
from rlmed.core.types import Completion, Example

log = logging.getLogger(__name__)


class RewardProcess(Protocol):
    """Handle of one process; `rewards.actor` has Ray's. Futures fail if the process is lost."""

    def ready(self) -> Future[str]:
        """Return host and process id when it has started."""
        ...

    def call(self, path: str, batched: bool, sent: bytes) -> Future[bytes]:
        """Call `serve` in the process."""
        ...

    def kill(self) -> None:
        """Kill it at once, whatever it computes."""
        ...


class Processes:
    """A fixed number of processes; each serves one call at a time and is replaced when lost.

    Example:
        >>> processes = Processes(start, 4, start_s=600.0)                    # doctest: +SKIP
        >>> call = processes.caller("my_rewards:slow_one", batched=False)     # doctest: +SKIP
        >>> call(60.0, [example], [completion], begun)                        # doctest: +SKIP
        [0.5]
    """

    def __init__(self, start: Callable[[int], RewardProcess], count: int, *, start_s: float) -> None:
        """Start nothing before the first call.

        Args:
            start: starts the process of a slot (0 .. count - 1) without waiting for it.
            count: number of processes.
            start_s: time limit for one to start, in seconds.
        """
        self.count, self._start, self._start_s = count, start, start_s
        self._lock = threading.Lock()
        self._processes: list[RewardProcess] = []
        self._closed = False
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(count):
            self._free.put(slot)

    def caller(self, path: str, *, batched: bool) -> TimedCall:
        """Return a call of the function "module:function", which the process imports.

        Args:
            path: of the function.
            batched: call it as f(examples, completions), not as f(example, completion).

        The call waits until a process is free and has started; only then does it call `begun`, and
        its time run. It raises what the function raises, `DeadlineError` after killing the process,
        or `RewardUnavailableError` if that is lost.
        """
        return functools.partial(self._call, path, batched)

    def close(self) -> None:
        """Kill all processes; calls under way fail."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()

    def _call(
        self,
        path: str,
        batched: bool,
        seconds: float,
        examples: Sequence[Example],
        completions: Sequence[Completion],
        begun: Callable[[], None],
    ) -> list[object]:
        sent = pickle.dumps((list(examples), list(completions)))
        slot = self._free.get()
        try:
            process, where = self._started(slot)
            begun()
            try:
                reply = process.call(path, batched, sent).result(seconds)
            except TimeoutError:
                self._replace(slot, process)
                raise DeadlineError from None
            except Exception as error:
                raise self._lost(slot, process, f"reward worker {slot} ({where}) was lost", error) from error
        finally:
            self._free.put(slot)
        raised, content = pickle.loads(reply)
        if raised:
            raise content
        return list(content)

    def _started(self, slot: int) -> tuple[RewardProcess, str]:
        """Wait until a slot's process has started; return it and where it runs."""
        process = self._process(slot)
        try:
            return process, process.ready().result(self._start_s)
        except TimeoutError:
            raise RewardError(
                f"reward worker {slot} has not started within {self._start_s:g} s (cluster.start_timeout_s): ask for fewer "
                f"than reward.slow.workers={self.count}, or less of reward.slow.worker_cpus for each"
            ) from None
        except Exception as error:
            raise self._lost(slot, process, f"reward worker {slot} could not be started", error) from error

    def _process(self, slot: int) -> RewardProcess:
        with self._lock:
            if self._closed:
                raise RewardUnavailableError("the run ends", again=False)
            if not self._processes:  # all at once: starting takes seconds
                self._processes = [self._start(number) for number in range(self.count)]
            return self._processes[slot]

    def _lost(self, slot: int, process: RewardProcess, what: str, error: Exception) -> RewardUnavailableError:
        if self._closed:
            return RewardUnavailableError("the run ends", again=False)
        self._replace(slot, process)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        log.warning("%s, and is replaced: %s", what, lines[0])
        return RewardUnavailableError(f"{what}: {lines[0]}")

    def _replace(self, slot: int, process: RewardProcess) -> None:
        with self._lock:
            process.kill()
            if not self._closed:
                self._processes[slot] = self._start(slot)


def serve(path: str, batched: bool, sent: bytes) -> bytes:
    """Call a function in this process; return its results, or what it raised.

    Args:
        path: "module:function".
        batched: see `Processes.caller`.
        sent: pickled examples and completions.

    Returns:
        A pickled pair: False and the list of results, or True and the exception.
    """
    try:
        function: Any = _loaded(path)
        examples, completions = pickle.loads(sent)
        if batched:
            values = list(function(examples, completions))
        else:
            values = [function(*pair) for pair in zip(examples, completions, strict=True)]
        return pickle.dumps((False, values))
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        return pickle.dumps((True, _portable(error)))


@functools.cache
def _loaded(path: str) -> Reward:
    try:
        return load_reward(path)
    except ValueError as error:
        raise RewardError(f"in a reward worker, {error}") from error


def _portable(error: BaseException) -> BaseException:
    """Return the exception if it survives the way to the other process, else one that says it."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception as failure:
        log.debug("%s cannot be pickled: %s", type(error).__name__, failure)
    return RuntimeError(f"{type(error).__name__}: {error}")
