"""Call a function that may never return."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")


class DeadlineError(Exception):
    """The call did not return in time."""

    def __init__(self, thread: threading.Thread | None = None) -> None:
        """`thread` is the abandoned one that still runs it, if there is one."""
        super().__init__("the call did not return in time")
        self.thread = thread


class _Alarm(BaseException):
    """Not an `Exception`, so that the called function cannot catch it as its own and continue."""


def call_within(seconds: float, function: Callable[[], Result]) -> Result:
    """Return the result of `function()`, or raise what it raises.

    In the main thread an alarm ends the call. That also stops a regular expression that backtracks
    forever: it holds the interpreter lock, so no other thread could even notice. In other threads,
    and on systems without alarms, the function runs in a thread that is abandoned at the deadline.
    That thread cannot be stopped, so never call an abandoned function again.

    Raises:
        DeadlineError: if it has not returned after `seconds`.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _under_alarm(seconds, function)
    return _in_thread(seconds, function)


def _under_alarm(seconds: float, function: Callable[[], Result]) -> Result:
    def ring(number: int, frame: FrameType | None) -> None:
        raise _Alarm

    previous_handler = signal.signal(signal.SIGALRM, ring)
    previous_timer = signal.getitimer(signal.ITIMER_REAL)
    try:
        try:
            # repeat every second, in case the first alarm is lost inside a destructor
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            return function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    except _Alarm:
        raise DeadlineError from None
    finally:
        # the alarm may have fired inside the inner clean-up
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous_handler or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, *previous_timer)


def _in_thread(seconds: float, function: Callable[[], Result]) -> Result:
    # one future per call: what an abandoned call returns later must not reach the next caller
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # re-raised in the caller
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="call with a deadline", daemon=True)
    thread.start()
    if not wait([outcome], timeout=seconds).done:
        raise DeadlineError(thread)
    return outcome.result()
