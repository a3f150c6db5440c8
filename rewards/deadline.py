"""Calling a function that may never return."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")


class DeadlineError(Exception):
    """The call did not end in time."""


class _Alarm(BaseException):
    """No `Exception`, so that the called function cannot take it for an error of its own and go on."""


def call_within(seconds: float, function: Callable[[], Result]) -> Result:
    """The result of `function()`, or what it raises.

    In the main thread an alarm ends the call, which also stops a regular expression that backtracks forever: it holds the
    interpreter, so another thread could not even notice. In other threads, and on systems without alarms, the function
    runs in a thread that is given up when time is over; that thread cannot be stopped, so call no function again that
    was given up.

    Raises:
        DeadlineError: when it has not returned after `seconds`.
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
            # again every second, for the case that the first alarm is lost inside a destructor
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            return function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    except _Alarm:
        raise DeadlineError from None
    finally:
        # the alarm may have rung inside the inner clean-up
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous_handler or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, *previous_timer)


def _in_thread(seconds: float, function: Callable[[], Result]) -> Result:
    # a future for this call alone: what a given-up call returns later must not reach the next caller
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # carried over to the caller and raised there
            outcome.set_exception(error)

    threading.Thread(target=work, name="call with a deadline", daemon=True).start()
    if not wait([outcome], timeout=seconds).done:
        raise DeadlineError
    return outcome.result()
