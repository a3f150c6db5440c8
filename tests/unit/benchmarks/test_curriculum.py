"""Completions sampled until an accuracy, from a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.curriculum import compare, completions_to, markdown, read_run


def curve(*accuracies: float) -> list[dict[str, float]]:
    return [
        {"step": 10 * i, "completions": 100.0 * i, "accuracy": accuracy} for i, accuracy in enumerate(accuracies, 1)
    ]


@pytest.mark.parametrize(
    ("level", "completions"), [(0.5, 100), (0.4, 100), (0.55, 150), (0.6, 200), (0.7, 300), (0.71, None)]
)
def test_completions_to_a_level_lie_between_two_evaluations(level: float, completions: float | None) -> None:
    found = completions_to(curve(0.5, 0.6, 0.7, 0.65), level)
    assert found == (completions if completions is None else pytest.approx(completions))


def test_a_group_without_rewards_teaches_nothing(tmp_path: Path) -> None:
    groups = [[None, None], [0.0, None, 1.0], [1.0, 1.0]]
    lines = [{"step": 1, "completions": [{"reward": reward} for reward in rewards]} for rewards in groups]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(tmp_path)["taught"] == pytest.approx(1 / 3)


def test_each_way_has_a_line_and_a_level_that_was_never_reached_is_said() -> None:
    runs: dict[str, list[dict[str, Any]]] = {
        "neither": [{"curve": curve(0.5, 0.6), "taught": 0.4}, {"curve": curve(0.5, 0.7), "taught": 0.5}],
        "both": [{"curve": curve(0.6, 0.9), "taught": 0.9}, {"curve": curve(0.4, 0.5), "taught": 0.8}],
    }
    compared = compare(runs, 0.6)
    assert compared["completions"] == {"neither": [200, pytest.approx(150)], "both": [100, None]}
    assert markdown(compared).splitlines()[2:] == [
        "| neither | 45 | 200, 150 | 175 | 200 | 65.0 |",
        "| both | 85 | 100, not reached |  | 200 | 70.0 |",
    ]
