"""Reward functions in processes: what they raise arrives, killed and hung ones are replaced."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rewards.cache import RewardCache
from rewards.deadline import DeadlineError
from rewards.extra import RewardError
from rewards.processes import Processes, serve
from rewards.rubric import Rubric
from rewards.slow import Noted, RewardUnavailableError, TimedCall
from rewards.slow_parts import SlowRewards
from rlmed.core.config.composing import compose_config
from tests.integration.processes import wait_until
from tests.unit.rewards.groups import group_of

PATIENT = 60.0
MODULE = """
import os, re, signal
from pathlib import Path
from rewards.slow import Noted, RewardUnavailableError

class OwnError(Exception):
    def __init__(self, first, second):
        super().__init__(first + second)

def process(example, completion):
    return os.getpid()

def lengths(examples, completions):
    return [Noted(len(completion.text), completion.text.upper()) for completion in completions]

def raises(example, completion):
    match completion.text:
        case "key": raise KeyError("score")
        case "later": raise RewardUnavailableError("busy", after_s=3.0, again=False)
        case "exit": raise SystemExit(3)
        case "own": raise OwnError("a", "b")

def hangs(example, completion):
    return re.fullmatch("(a+)+b", "a" * 60) if completion.text == "hang" else os.getpid()

def dies_once(example, completion):
    try:
        Path("alive").unlink()
    except FileNotFoundError:
        return len(completion.text)
    os.kill(os.getpid(), signal.SIGKILL)

unpickled = lambda example, completion: (lambda: 0)
"""


class Own:
    """A process of Python's own, with what `rewards.actor` does by Ray."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=os.chdir, initargs=(folder,))
        self._pid = self._pool.submit(os.getpid)

    def ready(self) -> Future[str]:
        done: Future[str] = Future()
        done.set_result(f"process {self._pid.result()}")
        return done

    def call(self, path: str, batched: bool, sent: bytes) -> Future[bytes]:
        return self._pool.submit(serve, path, batched, sent)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid.result(), signal.SIGKILL)
        self._pool.shutdown(wait=False)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_of_processes.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def processes(folder: Path) -> Iterator[Processes]:
    processes = Processes(lambda slot: Own(folder), 1, start_s=PATIENT)
    yield processes
    processes.close()


@pytest.fixture
def caller(processes: Processes) -> Callable[..., TimedCall]:
    def make(name: str, *, batched: bool = False) -> TimedCall:
        return processes.caller(f"own_of_processes:{name}", batched=batched)

    return make


def arguments(*texts: str, begun: Callable[[], None] = lambda: None) -> tuple[list[Any], list[Any], Callable[[], None]]:
    group = group_of(texts)
    return [group.prompt.example] * len(texts), list(group.completions), begun


def test_results_come_back_with_their_notes_from_another_process(caller: Callable[..., TimedCall]) -> None:
    values: Any = caller("lengths", batched=True)(PATIENT, *arguments("a", "bbb"))
    assert [(float(value), type(value), value.note) for value in values] == [(1.0, Noted, "A"), (3.0, Noted, "BBB")]
    assert caller("process")(PATIENT, *arguments("a")) != [os.getpid()]


@pytest.mark.parametrize(
    ("text", "expected"), [("key", "'score'"), ("later", "busy"), ("exit", "3"), ("own", "OwnError: ab")]
)
def test_an_exception_comes_back_as_what_it_was(text: str, expected: str, caller: Callable[..., TimedCall]) -> None:
    kinds = {"key": KeyError, "later": RewardUnavailableError, "exit": SystemExit, "own": RuntimeError}
    with pytest.raises(kinds[text]) as error:
        caller("raises")(PATIENT, *arguments(text))
    assert str(error.value) == expected
    if isinstance(error.value, RewardUnavailableError):
        assert (error.value.after_s, error.value.again) == (3.0, False)


def test_what_cannot_travel_or_be_imported_is_an_error(caller: Callable[..., TimedCall]) -> None:
    with pytest.raises(Exception, match="pickle"):
        caller("unpickled")(PATIENT, *arguments("a"))
    with pytest.raises(RewardError, match=r"'absent' does not exist"):
        caller("absent")(PATIENT, *arguments("a"))


def test_a_call_past_its_time_is_ended_even_if_it_holds_the_interpreter(caller: Callable[..., TimedCall]) -> None:
    hangs = caller("hangs")
    before = hangs(PATIENT, *arguments("a"))
    with pytest.raises(DeadlineError):
        hangs(0.1, *arguments("hang"))
    wait_until(lambda: not is_there(int(str(before[0]))), PATIENT, "the process ends")
    assert hangs(PATIENT, *arguments("a")) != before


def test_a_killed_process_is_a_failed_attempt_and_the_call_is_asked_again(
    processes: Processes,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_of_processes", raising=False)
    (folder / "alive").touch()
    config = compose_config("train", ["reward.slow.wait_s=0.001"]).reward
    settings = dataclasses.replace(config.slow, names=("dies_once",), retries=1)
    slow = SlowRewards(settings, config.judge, RewardCache(tmp_path / "rewards.jsonl"), processes=processes)
    rubric = Rubric.from_config({}, ["own_of_processes:dies_once"], slow=slow)
    assert rubric.score(group_of(["a", "bbb"])).rewards.tolist() == [1.0, 3.0]
    rubric.close()
    assert RewardCache(tmp_path / "rewards.jsonl").spent("dies_once")[0] == 3
    assert "was lost, and is replaced" in caplog.text


def test_a_process_that_does_not_start_says_what_to_ask_for_less_of() -> None:
    class Waiting(Own):
        def __init__(self) -> None: ...

        def ready(self) -> Future[str]:
            return Future()

        def kill(self) -> None: ...

    with pytest.raises(RewardError, match=r"reward\.slow\.workers=2"):
        Processes(lambda slot: Waiting(), 2, start_s=0.05).caller("m:f", batched=False)(1.0, *arguments("a"))


def test_a_wait_for_a_process_is_not_spent(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start of a call takes 10 s of the clock, each call 1 s, and the first one waits 50 s."""
    now, begun, gate = [0.0], threading.Event(), threading.Event()
    monkeypatch.setattr("rewards.slow_reward.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_of_processes", raising=False)

    class Computing:
        def ready(self) -> Future[str]:
            now[0] += 10.0
            return completed("process 1")

        def call(self, path: str, batched: bool, sent: bytes) -> Future[bytes]:
            if path.endswith("process"):
                begun.set()
                gate.wait()
                now[0] += 50.0
            now[0] += 1.0
            return completed(pickle.dumps((False, [0.5])))

        def kill(self) -> None: ...

    config = compose_config("train", []).reward
    names = ("process", "hangs")
    slow = SlowRewards(
        dataclasses.replace(config.slow, names=names, max_seconds=100.0),
        cache=RewardCache(tmp_path / "rewards.jsonl"),
        processes=Processes(lambda slot: Computing(), 1, start_s=PATIENT),
    )
    rubric = Rubric.from_config({}, [f"own_of_processes:{name}" for name in names], slow=slow)
    rubric.begin(group_of(["a"]))
    assert begun.wait(PATIENT)
    wait_until(lambda: "reward hangs" in {thread.name for thread in threading.enumerate()}, PATIENT, "it waits")
    gate.set()
    assert rubric.score(group_of(["a"])).rewards.tolist() == [1.0]
    rubric.close()
    cache = RewardCache(tmp_path / "rewards.jsonl")
    assert [cache.spent(name)[1] for name in names] == [51.0, 1.0]


def completed(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def test_with_one_process_of_all_workers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reward\.slow\.workers=2 .*cluster=ray"):
        compose_config("train", ["reward.slow.workers=2"])
    assert compose_config("train", ["reward.slow.workers=2", "cluster=ray"]).reward.slow.workers == 2
