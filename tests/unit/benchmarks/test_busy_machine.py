"""Comparing ways to wait: each process gets one way and no other; shares are of OpenMP's alone."""

from __future__ import annotations

import argparse
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import busy_machine
from benchmarks.busy_machine import WAYS, measure, tokens_per_second
from rlmed.core.process.threads import WAITING

ARGUMENTS = argparse.Namespace(rounds=2, threads=1, model=None, turns=1)


@pytest.mark.parametrize("way", WAYS)
def test_a_process_is_given_one_way_to_wait(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAITING:
        monkeypatch.setenv(name, "ACTIVE")  # as a user may have set it
    given: dict[str, str] = {}

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> SimpleNamespace:
        given.update(env)
        return SimpleNamespace(stdout="a line before\n123.4\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert tokens_per_second(way, ARGUMENTS) == 123.4
    assert {name: value for name, value in given.items() if name in WAITING} == WAYS[way]


def test_shares_are_of_openmps_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def speed(way: str, _: argparse.Namespace) -> float:
        asked.append(way)
        return {"OpenMP's own": 200.0, "rlmed": 190.0}.get(way, 100.0) / (1 if len(asked) <= len(WAYS) else 2)

    monkeypatch.setattr(busy_machine, "tokens_per_second", speed)
    found = measure(ARGUMENTS)["ways"]
    assert asked == [*WAYS, *WAYS]  # they take turns, first alone, then beside a busy process
    assert found["rlmed"] == {"alone": 190.0, "busy": 95.0, "alone_share": 0.95, "busy_share": 0.475}
