"""Functions of users that take time: batches, threads, retries, limits; fast ones stay."""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rewards.cache import RewardCache
from rewards.extra import RewardError
from rewards.rubric import Rubric
from rewards.slow import Noted, RewardUnavailableError, slow
from rewards.slow_parts import SlowRewards
from rlmed.core.config.composing import compose_config
from tests.unit.rewards.groups import group_of


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The user's, in which a test puts functions."""
    module = ModuleType("slow_rewards")
    module.__file__ = "slow_rewards.py"
    monkeypatch.setitem(sys.modules, "slow_rewards", module)
    return module


@pytest.fixture
def make_rubric(module: ModuleType) -> Iterator[Callable[..., Rubric]]:
    """`make_rubric(function)`: a rubric of it alone; changes are of `reward.slow`."""
    rubrics = []

    def make(
        function: Callable[..., Any], *, path: Path | None = None, timeout_s: float = 60.0, **changes: Any
    ) -> Rubric:
        module.__dict__["own"] = function
        config = compose_config("train", ["reward.slow.wait_s=0.001"]).reward
        changed = dataclasses.replace(config.slow, **changes)
        parts = SlowRewards(changed, config.judge, RewardCache(path))
        rubrics.append(Rubric.from_config({}, ["slow_rewards:own"], timeout_s=timeout_s, slow=parts))
        return rubrics[-1]

    yield make
    for rubric in rubrics:
        rubric.close()


def length(example: Any, completion: Any) -> float:
    return float(len(completion.text))


def test_fast_rewards_start_no_thread_and_are_called_in_the_caller_s(make_rubric: Callable[..., Rubric]) -> None:
    callers, before = [], set(threading.enumerate())

    def own(example: Any, completion: Any) -> float:
        callers.append(threading.current_thread())
        return 1.0

    rubric = make_rubric(own)
    rubric.begin(group_of(["a"]))
    assert callers == []
    rubric.score(group_of(["a", "b"]))
    assert not rubric.is_slow
    assert set(callers) == {threading.current_thread()}
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("marked", ["by its mark", "by name"])
def test_calls_of_several_groups_go_on_while_nobody_waits(marked: str, make_rubric: Callable[..., Rubric]) -> None:
    together = threading.Barrier(6)

    def own(example: Any, completion: Any) -> float:
        together.wait(timeout=60)
        return length(example, completion)

    rubric = (
        make_rubric(slow(concurrency=6)(own))
        if marked == "by its mark"
        else make_rubric(own, names=("own",), concurrency=6)
    )
    groups = [group_of(["a" * (3 * index + n) for n in (1, 2, 3)], index) for index in (0, 1)]
    for group in groups:
        rubric.begin(group)
    # asked for in another order than begun
    assert [rubric.score(group).rewards.tolist() for group in groups[::-1]] == [[4.0, 5.0, 6.0], [1.0, 2.0, 3.0]]


def test_no_more_calls_than_set_at_a_time_and_older_groups_first(make_rubric: Callable[..., Rubric]) -> None:
    lock, order, running, most = threading.Lock(), [], 0, 0
    started, gate = threading.Event(), threading.Event()

    @slow(concurrency=1)
    def own(example: Any, completion: Any) -> float:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            order.append(completion.text)
        started.set()
        gate.wait()
        with lock:
            running -= 1
        return 0.0

    rubric = make_rubric(own)
    groups = [group_of([f"{index}{n}" for n in "ab"], index) for index in (9, 2, 5)]
    for group in groups:
        rubric.begin(group)
        started.wait()
    gate.set()
    for group in groups:
        rubric.score(group)
    assert most == 1
    # the first call had begun before the others were known
    assert order == ["9a", "2a", "2b", "5a", "5b", "9b"]


def test_a_batch_holds_completions_of_a_group_each_text_once(
    make_rubric: Callable[..., Rubric], tmp_path: Path
) -> None:
    asked = []

    @slow(batch_size=3, concurrency=1)
    def own(examples: Any, completions: Any) -> list[float]:
        asked.append([completion.text for completion in completions])
        assert {example.id for example in examples} == {"mri-7"}
        return [float(len(completion.text)) for completion in completions]

    rubric = make_rubric(own, path=tmp_path / "rewards.jsonl")
    scored = rubric.score(group_of(["a", "bb", "a", "ccc", "dddd", "bb"]))
    assert scored.rewards.tolist() == [1, 2, 1, 3, 4, 2]
    assert asked == [["a", "bb", "ccc"], ["dddd"]]
    rubric.score(group_of(["ccc", "eeeee"], 1))
    assert asked[2:] == [["eeeee"]]
    # each call is a line: after a kill a batch is there as a whole or not at all
    assert len((tmp_path / "rewards.jsonl").read_text().splitlines()) == 3


def test_a_text_that_is_being_asked_for_is_not_asked_again(make_rubric: Callable[..., Rubric]) -> None:
    calls, gate = [], threading.Event()

    @slow(concurrency=4)
    def own(example: Any, completion: Any) -> float:
        calls.append(completion.text)
        gate.wait()
        return 0.5

    rubric = make_rubric(own)
    groups = [group_of(["a", "a"], index) for index in (0, 1)]
    for group in groups:
        rubric.begin(group)
        rubric.begin(group)
    gate.set()
    assert [rubric.score(group).rewards.tolist() for group in groups] == [[0.5, 0.5]] * 2
    assert calls == ["a"]


def test_without_cache_a_later_group_is_asked_for_again(make_rubric: Callable[..., Rubric], tmp_path: Path) -> None:
    calls = []
    rubric = make_rubric(
        slow()(lambda example, completion: calls.append(1) or 0.5), path=tmp_path / "rewards.jsonl", cache=False
    )
    for index in (0, 1):
        rubric.score(group_of(["a"], index))
    assert len(calls) == 2
    assert not (tmp_path / "rewards.jsonl").exists()


@pytest.mark.parametrize(
    "failure", [RuntimeError("busy"), RewardUnavailableError("busy"), SystemExit(1), TimeoutError(), KeyError("score")]
)
def test_a_call_that_fails_is_repeated(failure: BaseException, make_rubric: Callable[..., Rubric]) -> None:
    calls = []

    @slow(retries=2)
    def own(example: Any, completion: Any) -> float:
        calls.append(1)
        if len(calls) < 3:
            raise failure
        return 1.0

    assert make_rubric(own).score(group_of(["a"])).rewards.tolist() == [1.0]


def test_a_call_that_hangs_is_repeated_and_its_late_result_dropped(make_rubric: Callable[..., Rubric]) -> None:
    calls, released = [], threading.Event()

    @slow(retries=1, timeout_s=0.1)
    def own(example: Any, completion: Any) -> float:
        calls.append(1)
        if len(calls) == 1:
            released.wait()
            return 111.0
        return 1.0

    assert make_rubric(own).score(group_of(["a"])).rewards.tolist() == [1.0]
    released.set()


def test_calls_that_all_hang_end_the_run_even_if_they_may_be_missing(make_rubric: Callable[..., Rubric]) -> None:
    released = threading.Event()

    @slow(retries=9, timeout_s=0.02, concurrency=1, on_failure="missing")
    def own(example: Any, completion: Any) -> float:
        released.wait()
        return 0.0

    with pytest.raises(RewardError, match="5 calls that took longer than"):
        make_rubric(own).score(group_of(["a"]))
    released.set()


def test_attempts_that_all_fail_stop_the_run(make_rubric: Callable[..., Rubric]) -> None:
    calls = []

    @slow(retries=2)
    def own(example: Any, completion: Any) -> float:
        calls.append(1)
        raise RuntimeError("no route")

    rubric = make_rubric(own)
    with pytest.raises(RewardError, match=r"own .*'mri-7': .*RuntimeError: no route, the last of 3 attempts") as error:
        rubric.score(group_of(["a"]))
    assert "resume=auto" in str(error.value)
    with pytest.raises(RewardError, match="no route"):  # and nothing is called any more
        rubric.score(group_of(["b"], 1))
    assert len(calls) == 3


def test_after_a_failure_the_next_gets_one_attempt_until_one_succeeds(make_rubric: Callable[..., Rubric]) -> None:
    calls, broken = [], True

    @slow(retries=3, on_failure="missing", concurrency=1)
    def own(example: Any, completion: Any) -> float:
        calls.append(completion.text)
        if broken:
            raise RuntimeError
        return 1.0

    rubric = make_rubric(own)
    scored = rubric.score(group_of(["a", "b", "c"]))
    assert np.isnan(scored.reward_parts["own"]).all()
    assert scored.rewards.tolist() == [0.0] * 3
    assert not scored.rewarded  # these zeros say nothing
    assert calls == ["a"] * 4 + ["b", "c"]
    broken = False
    assert rubric.score(group_of(["d"], 1)).rewarded
    broken = True
    rubric.score(group_of(["e"], 2))
    assert calls[6:] == ["d", "e", "e", "e", "e"]
    assert rubric.metrics()["reward/own_missing"] == 4


def test_an_answer_of_no_use_takes_no_attempts_from_others(make_rubric: Callable[..., Rubric]) -> None:
    calls = []

    @slow(retries=1, on_failure="missing", concurrency=1)
    def own(example: Any, completion: Any) -> float:
        calls.append(completion.text)
        if completion.text == "a":
            raise RewardUnavailableError("no mark", answered=True)
        if calls.count("b") == 1:
            raise RewardUnavailableError("busy")
        return 1.0

    np.testing.assert_array_equal(make_rubric(own).score(group_of(["a", "b"])).reward_parts["own"], [np.nan, 1])
    assert calls == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "returned None"),
        (float("nan"), "returned nan"),
        (Noted(float("nan"), "why"), "returned nan"),
        (Noted(float("inf"), "why"), "returned inf"),
        ("1", "not a number"),
        ([1.0, 2.0], "2 numbers for 1"),
    ],
)
def test_a_function_that_returns_no_number_is_wrong_and_not_missing(
    value: object, reason: str, make_rubric: Callable[..., Rubric]
) -> None:
    batched = isinstance(value, list)
    own = slow(on_failure="missing", batch_size=2 if batched else None)(lambda *arguments: value)
    with pytest.raises(RewardError, match=reason):
        make_rubric(own).score(group_of(["a"]))


def test_seconds_are_a_budget_too(make_rubric: Callable[..., Rubric], tmp_path: Path) -> None:
    own = slow(on_failure="missing")(length)
    path = tmp_path / "rewards.jsonl"
    RewardCache(path).add("own", {}, calls=1, seconds=30.0)
    values = make_rubric(own, path=path, max_seconds=30.0).score(group_of(["a"])).reward_parts["own"]
    assert np.isnan(values).all()
    assert make_rubric(own, path=path, max_seconds=31.0).score(group_of(["a"])).rewards.tolist() == [1.0]


@pytest.mark.parametrize("failure", ["raises", "hangs", "returns None"])
def test_calls_that_failed_before_a_resume_are_spent(
    failure: str, make_rubric: Callable[..., Rubric], tmp_path: Path
) -> None:
    path, released, calls = tmp_path / "rewards.jsonl", threading.Event(), []

    @slow(retries=1, timeout_s=0.05 if failure == "hangs" else 60.0)
    def own(example: Any, completion: Any) -> float:
        calls.append(1)
        if failure == "hangs":
            released.wait()
        if failure == "returns None":
            return None  # type: ignore[return-value]
        raise RuntimeError

    with pytest.raises(RewardError):
        make_rubric(own, path=path).score(group_of(["a"]))
    spent, seconds = RewardCache(path).spent("own")
    assert spent == len(calls) > 0
    assert seconds > 0 or failure != "hangs"
    with pytest.raises(RewardError, match=f"{spent} calls are spent"):
        make_rubric(own, path=path, max_calls=spent).score(group_of(["a"]))
    assert len(calls) == spent
    released.set()


def test_a_changed_file_is_asked_again(make_rubric: Callable[..., Rubric], module: ModuleType, tmp_path: Path) -> None:
    source, path, calls = tmp_path / "slow_rewards.py", tmp_path / "rewards.jsonl", []

    @slow()
    def own(example: Any, completion: Any) -> float:
        calls.append(1)
        return 0.0

    own.__module__, module.__file__ = "slow_rewards", str(source)
    for text, expected in (("one", 1), ("one", 1), ("two", 2)):
        source.write_text(text)
        make_rubric(own, path=path).score(group_of(["a"]))
        assert len(calls) == expected


def test_an_example_whose_picture_is_gone_is_an_error_where_it_is_scored(make_rubric: Callable[..., Rubric]) -> None:
    group = group_of(["a"])
    example = dataclasses.replace(group.prompt.example, image=Path("/nowhere/picture.png"))
    group = group_of(["a"], example=example)
    rubric = make_rubric(slow()(length))
    rubric.begin(group)
    with pytest.raises(FileNotFoundError, match=r"picture\.png"):
        rubric.score(group)


@pytest.mark.parametrize(
    "given", [{"batch_size": 0}, {"timeout_s": -1}, {"max_calls": 0}, {"retries": -1}, {"on_failure": "zero"}]
)
def test_a_mark_with_impossible_arguments_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"slow\({next(iter(given))}="):
        slow(**given)


def test_a_name_that_is_no_extra_function_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reward\.slow\.names has 'own'"):
        compose_config("train", ["reward.slow.names=[own]"])


@pytest.mark.parametrize(
    "given", [{"workers": 2}, {"max_calls": 9}, {"max_seconds": 9.0}], ids=["workers", "max_calls", "max_seconds"]
)
def test_a_setting_that_no_function_reads_is_refused(given: dict[str, Any], make_rubric: Callable[..., Rubric]) -> None:
    def own(example: Any, completion: Any) -> float:
        return 1.0

    (key,) = given
    with pytest.raises(ValueError, match=rf"reward\.slow\.{key}=9?2?.*slow_rewards:own.*reward\.slow\.names"):
        make_rubric(own, **given)
    make_rubric(slow()(own), **given)


def test_failures_are_said_by_their_share_and_not_one_by_one(
    make_rubric: Callable[..., Rubric], caplog: pytest.LogCaptureFixture
) -> None:
    broken = True

    @slow(retries=0, on_failure="missing", concurrency=1)
    def own(example: Any, completion: Any) -> float:
        if broken and completion.text.endswith(("1", "2", "3")):
            raise RuntimeError(f"no route to {completion.text}")
        return 1.0

    def score(turn: int, count: int) -> list[str]:
        caplog.clear()
        rubric.score(group_of([f"{turn}.{index}" for index in range(count)], turn))
        return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]

    rubric = make_rubric(own)
    first, often = score(0, 60)
    assert "no route to 0.1: it counts as missing" in first
    assert "reward own: 32% of its latest 22 calls failed" in often
    assert "no route to 0.21" in often
    assert score(1, 200) == []
    assert rubric.metrics()["reward/own_missing"] == 18 + 60
    broken = False
    assert score(2, 100) == []
    broken = True
    (again,) = score(3, 200)
    assert "25% of its latest 100 calls" in again
