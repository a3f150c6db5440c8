"""Calls with a deadline: results and errors pass, alarms leave no trace, one call never hears of another."""

import signal
import threading
import time
from contextlib import nullcontext

import pytest

from rewards.deadline import DeadlineError, call_within


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
    assert call(5.0, lambda: 42) == 42
    assert call(5.0, lambda: None) is None
    with pytest.raises(KeyError, match="mine"):
        call(5.0, fail)
    with pytest.raises(SystemExit):
        call(5.0, lambda: exec("raise SystemExit"))


def test_a_slow_call_ends_in_time(call):
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        call(0.1, lambda: time.sleep(30))
    assert 0.1 <= time.monotonic() - started < 5


def test_a_late_result_does_not_reach_the_next_call(call):
    with pytest.raises(DeadlineError):
        call(0.05, lambda: time.sleep(0.2) or "late")
    assert call(5.0, lambda: time.sleep(0.3) or "own") == "own"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")
@pytest.mark.parametrize(
    ("function", "outcome"),
    [
        (lambda: 1, nullcontext()),
        (fail, pytest.raises(KeyError)),
        (lambda: time.sleep(30), pytest.raises(DeadlineError)),
    ],
    ids=["returns", "raises", "hangs"],
)
def test_handler_and_timer_of_the_program_are_put_back(function, outcome):
    rung = []
    original = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with outcome:
            call_within(0.1, function)
        assert rung == []
        end = time.monotonic() + 10
        while not rung and time.monotonic() < end:
            time.sleep(0.01)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, original)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms on this system")
def test_a_function_that_swallows_the_first_alarm_meets_a_second():
    def stubborn() -> None:
        try:
            time.sleep(4)
        except BaseException:
            time.sleep(4)

    with pytest.raises(DeadlineError):
        call_within(0.1, stubborn)
