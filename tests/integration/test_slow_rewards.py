"""Whole runs with an LLM judge: killed and resumed, or with a judge that is gone."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration import launch_and_die
from tests.integration.forked import Finished, run_forked
from tests.integration.short_run import SHORT_RUN
from tests.judge_server import JudgeServer, Reply, judging

pytest.importorskip("openai", reason="needs the extra serve")
pytestmark = pytest.mark.slow

STEPS = 4


def opinion(prompt: str, number: int) -> Reply:
    """A mark that depends on the prompt alone."""
    return Reply(f'{{"score": {hashlib.sha256(prompt.encode()).digest()[0] % 11}}}')


def launch(place: str, outputs: Path, server: JudgeServer, *overrides: str) -> Finished:
    judge = (
        "+reward.weights.judge=1",
        f"reward.judge.url={server.url}",
        "reward.judge.model=m",
        "reward.slow.wait_s=0.01",
        f"steps={STEPS}",
    )
    return run_forked(launch_and_die.main, [place, *SHORT_RUN, *judge, *overrides], outputs)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors")


@pytest.fixture
def workplace(tmp_path: Path, with_images: Callable[[Path], Path]) -> Path:
    return with_images(tmp_path)


def test_killed_in_a_reward_and_resumed_equals_uninterrupted_and_asks_nothing_twice(workplace: Path) -> None:
    whole, folder = workplace / "whole", workplace / "killed"
    with judging(opinion) as server:
        done = launch("nowhere", workplace, server, f"hydra.run.dir={whole}")
        assert done.returncode == 0, done.output
        asked = len(server.bodies)
        killed = launch("reward:60", workplace, server, f"hydra.run.dir={folder}")
        assert killed.returncode == -signal.SIGKILL, killed.output
        *kept, half = (folder / "rewards.jsonl").read_text().splitlines()
        before = len(server.bodies)
        resumed = launch("nowhere", workplace, server, f"resume={folder}")
        assert resumed.returncode == 0, resumed.output
        again = len(server.bodies) - before

    assert len(kept) == 59
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(half)
    assert again == asked - len(kept) > 0
    assert "rewards.jsonl: 1 damaged lines (60)" in resumed.output
    rollouts = [
        [{key: value for key, value in line.items() if key != "image"} for line in lines(path / "rollouts.jsonl")]
        for path in (whole, folder)
    ]
    assert rollouts[0] == rollouts[1]
    marks = {entry["reward_parts"]["judge"] for line in rollouts[0] for entry in line["completions"]}
    assert len(marks) > 3
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(folder)[name]), name
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all(line["seconds/reward"] >= 0 and line["seconds/reward_calls"] > 0 for line in metrics)


def test_a_judge_that_goes_down_ends_the_run_with_one_line_and_it_goes_on_when_it_is_back(workplace: Path) -> None:
    """Before its first checkpoint, while an older run of the name has one."""
    down = threading.Event()
    older = workplace / "outputs" / "judged" / "older" / "checkpoints" / "step-000002"
    older.mkdir(parents=True)

    def answer(prompt: str, number: int) -> Reply:
        if number > 10:
            down.set()
        return Reply(status=503, body=b"{}") if down.is_set() else opinion(prompt, number)

    with judging(answer) as server:
        stopped = launch("nowhere", workplace, server, "name=judged", "reward.judge.retries=1")
        assert stopped.returncode == 2, stopped.output
        (line,) = [line for line in stopped.output.splitlines() if line.startswith("error: ")]
        for part in ("reward judge on example", "status 503", "resume=auto", "reward.judge.on_failure=missing"):
            assert part in line
        assert "Traceback" not in stopped.output
    (folder,) = [path for path in (workplace / "outputs" / "judged").iterdir() if path.name != "older"]
    kept = {key for line in lines(folder / "rewards.jsonl") for key in line["values"]}
    assert len(kept) == 10
    # it is back, elsewhere
    with judging(opinion) as server:
        resumed = launch("nowhere", workplace, server, "name=judged", "resume=auto")
        assert resumed.returncode == 0, resumed.output
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
    asked = [key for line in lines(folder / "rewards.jsonl") for key in line["values"]]
    assert len(asked) == len(set(asked)) == len(server.bodies) + len(kept)


def test_a_judge_that_is_sometimes_lost_is_counted(workplace: Path) -> None:
    def answer(prompt: str, number: int) -> Reply:
        return Reply("who knows") if number % 9 == 0 else opinion(prompt, number)

    folder = workplace / "run"
    settings = ("reward.judge.on_failure=missing", "reward.judge.retries=0", "steps=2")
    with judging(answer) as server:
        done = launch("nowhere", workplace, server, f"hydra.run.dir={folder}", *settings)
        assert done.returncode == 0, done.output
    metrics = lines(folder / "metrics.jsonl")
    groups = lines(folder / "rollouts.jsonl")
    missing = [entry for line in groups for entry in line["completions"] if entry["reward_parts"]["judge"] is None]
    assert sum(line["reward/judge_missing"] for line in metrics) == len(missing) > 0
    for line in groups:
        parts = [entry["reward_parts"] for entry in line["completions"]]
        counts = all(part["judge"] is not None for part in parts)
        for entry, part in zip(line["completions"], parts, strict=True):
            assert entry["reward"] == pytest.approx(part["format"] + part["choice"] + (part["judge"] if counts else 0))
    assert (folder / "report.html").is_file()
