"""Calls with a deadline: results and errors pass, alarms leave no trace, calls stay apart."""

import signal
import threading
import time
from contextlib import nullcontext

import pytest

from rewards.deadline import DeadlineError, call_within

PATIENT = 600.0
"""A limit that no call here reaches, even where the machine stands still for a while."""


def in_thread(seconds, function):
    """`call_within` called outside the main thread; errors are raised here."""
    outcome = []

    def run() -> None:
        try:
            outcome.append((call_within(seconds, function), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


@pytest.fixture(params=[call_within, in_thread], ids=["main thread", "other thread"])
def call(request):
    return request.param


def fail() -> None:
    raise KeyError("mine")


def test_results_and_errors_pass(call):
    assert call(PATIENT, lambda: 42) == 42
    assert call(PATIENT, lambda: None) is None
    with pytest.raises(KeyError, match="mine"):
        call(PATIENT, fail)
    with pytest.raises(SystemExit):
        call(PATIENT, lambda: exec("raise SystemExit"))


def test_a_call_that_never_returns_ends(call):
    released = threading.Event()
    with pytest.raises(DeadlineError):
        call(0.1, released.wait)
    released.set()


def test_a_late_result_does_not_reach_the_next_call(call):
    released, returned = threading.Event(), threading.Event()

    def late():
        try:
            released.wait()
            return "late"
        finally:
            returned.set()

    def own():
        released.set()
        returned.wait()
        time.sleep(0.05)  # the late result goes where it goes
        return "own"

    with pytest.raises(DeadlineError):
        call(0.05, late)
    assert call(PATIENT, own) == "own"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")
@pytest.mark.parametrize(
    ("limit", "function", "outcome"),
    [
        (PATIENT / 2, lambda: 1, nullcontext()),
        (PATIENT / 2, fail, pytest.raises(KeyError)),
        (0.1, threading.Event().wait, pytest.raises(DeadlineError)),
    ],
    ids=["returns", "raises", "hangs"],
)
def test_handler_and_timer_of_the_program_are_put_back(limit, function, outcome):
    rung = []
    original = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, PATIENT)
        with outcome:
            call_within(limit, function)
        assert rung == []
        assert PATIENT / 2 < signal.getitimer(signal.ITIMER_REAL)[0] <= PATIENT
        signal.raise_signal(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, original)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")
def test_a_function_that_swallows_the_first_alarm_meets_a_second():
    def stubborn() -> None:
        try:
            time.sleep(60)
        except BaseException:
            time.sleep(60)

    with pytest.raises(DeadlineError):
        call_within(0.1, stubborn)
