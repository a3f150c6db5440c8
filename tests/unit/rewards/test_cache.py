"""What slow rewards returned is kept, through kills and beside other processes."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from rewards.cache import RewardCache, key_of
from rlmed.core.types import Example
from tests.unit.rewards.groups import EXAMPLE


def test_values_are_there_again_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "rewards.jsonl"
    cache = RewardCache(path)
    cache.add("judge", {"a": 0.1, "b": 1 / 3}, calls=2, seconds=1.5, notes={"a": "good\n"})
    cache.add("judge", {"a": 0.9}, calls=1, seconds=0.5)
    cache.add("other", {"c": -2.0}, calls=1, seconds=0.25)
    for seen in (cache, RewardCache(path)):
        assert [seen.get(key) for key in "abcd"] == [0.1, 1 / 3, -2.0, None]
    assert RewardCache(path).spent("judge") == (3, 2.0)
    assert json.loads(path.read_text().splitlines()[0])["notes"] == {"a": "good\n"}
    cache.close()


def test_without_a_file_values_are_kept_in_memory() -> None:
    cache = RewardCache(None)
    cache.add("judge", {"a": 0.5}, calls=1, seconds=1.0)
    assert cache.get("a") == 0.5


WHOLE = '{"reward": "judge", "values": {"a": 0.5}, "calls": 1, "seconds": 1.0}\n'


@pytest.mark.parametrize(
    "damaged",
    [
        '{"reward": "judge", "values": {"b": 0.',
        "\0\0\0\0\n",
        "[]\n",
        '"text"\n',
        '{"reward": "judge"}\n',
        '{"reward": "judge", "values": {"b": NaN}, "calls": 1, "seconds": 1.0}\n',
        '{"reward": "judge", "values": {"b": "x"}, "calls": 1, "seconds": 1.0}\n',
        '{"reward": "judge", "values": [1], "calls": 1, "seconds": 1.0}\n',
        "\udce9\n",
    ],
)
def test_a_damaged_line_is_skipped_with_a_warning(
    damaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rewards.jsonl"
    path.write_bytes(f"{WHOLE}{damaged}".encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        cache = RewardCache(path)
    assert "rewards.jsonl: 1 damaged lines (2)" in caplog.text
    assert (cache.get("a"), cache.get("b")) == (0.5, None)
    cache.add("judge", {"c": 0.25}, calls=1, seconds=0.0)
    cache.close()
    assert [RewardCache(path).get(key) for key in "abc"] == [0.5, None, 0.25]


def _write_many(path: str, name: str, count: int, half: bool) -> None:
    cache = RewardCache(Path(path))
    for number in range(count):
        cache.add(name, {f"{name}{number}": float(number)}, calls=1, seconds=0.0, notes={"x": "y" * 20_000})
    if half:  # die in the middle of a line, as a process killed in a write does
        assert cache._descriptor is not None
        os.write(cache._descriptor, b'{"reward": "' + name.encode())
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_write_into_one_file_and_one_is_killed_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rewards.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(str(path), name, 40, name == "b")) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    cache = RewardCache(path)
    cache.add("a", {"last": 1.0}, calls=1, seconds=0.0)
    cache.close()
    seen = RewardCache(path)
    assert all(seen.get(f"{name}{number}") == number for name in "ab" for number in range(40))
    assert seen.get("last") == 1.0
    assert seen.spent("a") == (41, 0.0)


def test_a_key_tells_apart_what_a_reward_may_depend_on_and_nothing_else(tmp_path: Path) -> None:
    for name, content in (("one.png", b"1"), ("same.png", b"1"), ("two.png", b"2")):
        (tmp_path / name).write_bytes(content)

    def key(example: Example = EXAMPLE, name: str = "judge", text: str = "x", **settings: object) -> str:
        return key_of(name, settings, example, text)

    def with_image(name: str) -> Example:
        return dataclasses.replace(EXAMPLE, image=tmp_path / name)

    different = [
        key(),
        key(name="other"),
        key(text="y"),
        key(text="\ud800"),
        key(model="m"),
        key(model="n"),
        key(dataclasses.replace(EXAMPLE, question="Where?")),
        key(dataclasses.replace(EXAMPLE, options=("chest", "head"))),
        key(dataclasses.replace(EXAMPLE, answer=0)),
        key(with_image("one.png")),
        key(with_image("two.png")),
        key(dataclasses.replace(with_image("one.png"), more_images=(tmp_path / "two.png",))),
    ]
    assert len(set(different)) == len(different)
    assert key(with_image("one.png")) == key(with_image("same.png"))
    assert key() == key()
