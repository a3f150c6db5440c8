"""`python -m rlmed.launch cluster=ray` as a person runs it: the same numbers as in one process, and lost processes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integration.processes import marked, new_mark, wait_until
from tests.integration.short_run import SHORT_RUN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
]
SETTINGS = (*SHORT_RUN, "algo.dynamic_sampling=false", "reward=reasoning")
ROUNDING = {"mismatch_kl", "mismatch_ratio"}
"""Differences of log-probabilities that are equal but for rounding."""


class Launch:
    """A run in a process of its own whose descendants can be found."""

    def __init__(
        self, folder: Path, *overrides: str, temporary: Path | None = None, omp_threads: str | None = "1"
    ) -> None:
        self.folder, self.mark = folder, new_mark()
        environment = os.environ | self.mark
        environment.pop("OMP_NUM_THREADS", None)
        if omp_threads is not None:
            environment["OMP_NUM_THREADS"] = omp_threads
        if temporary is not None:
            environment["TMPDIR"] = str(temporary)
        command = [sys.executable, "-m", "rlmed.launch", *SETTINGS, f"hydra.run.dir={folder}", *overrides]
        self.process = subprocess.Popen(
            command, cwd=folder.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.output = ""

    def finish(self, status: int = 0) -> str:
        """Wait for its end, which must have this exit status; nothing of it may be left running."""
        self.output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == status, self.output
        wait_until(lambda: not marked(self.mark), 30, "all processes of the run end")
        return self.output

    def victims(self, title: str) -> list[int]:
        return marked(self.mark, title)

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """Where runs put their temporary files; pytest's own folders have names too long for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="rt-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def local(runs: Path) -> Path:
    Launch(runs / "local").finish()
    return runs / "local"


def test_the_actors_of_a_killed_run_end(runs: Path, local: Path, temporary: Path) -> None:
    """Agents of Ray's own may go on for about a minute, until they notice that they are alone."""
    run = Launch(runs / "gone", "cluster=ray", "cluster.threads=1", temporary=temporary)
    wait_until(lambda: run.steps() >= 1, 120, "the first step")
    assert len(run.victims("Actor")) == 2
    run.process.kill()
    run.process.communicate()
    wait_until(lambda: not run.victims("Actor"), 30, "the actors of the killed run end")
    assert len(list(temporary.glob("rlmed-ray-*"))) == 1


def test_one_worker_gives_the_metrics_and_weights_of_a_single_process(runs: Path, local: Path, temporary: Path) -> None:
    Launch(runs / "ray", "cluster=ray", "cluster.threads=1", temporary=temporary).finish()
    # neither its own folder is left nor that of the killed run above
    assert not list(temporary.glob("rlmed-ray-*"))
    for ours, theirs in zip(metrics(runs / "ray"), metrics(local), strict=True):
        timed = {name for name in ours if name.startswith(("seconds/", "rollout/")) or "per_second" in name}
        assert set(ours) - timed == {n for n in theirs if not n.startswith("seconds/") and "per_second" not in n}
        for name in set(ours) - timed:
            tolerance = 1e-6 if name in ROUNDING else 1e-9
            assert ours[name] == pytest.approx(theirs[name], abs=tolerance, rel=1e-6), (name, ours["step"])
    ours, theirs = (load_file(folder / "checkpoints/step-000006/model.safetensors") for folder in (runs / "ray", local))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-6


def test_a_killed_worker_costs_no_group_and_a_killed_rank_is_resumed_with_one_command(runs: Path, local: Path) -> None:
    """Two ranks, of which one dies; the run goes on with one."""
    settings = ("cluster=ray", "cluster.rollout_workers=2", "cluster.threads=1")
    run = Launch(runs / "killed", *settings, "cluster.learner_ranks=2")
    wait_until(lambda: run.steps() >= 1, 120, "the first step")
    os.kill(run.victims("ray::RolloutActor")[0], signal.SIGKILL)
    wait_until(lambda: run.steps() >= 3, 120, "two more steps")
    os.kill(run.victims("ray::LearnerActor")[1], signal.SIGKILL)
    said = run.finish(status=3)
    assert re.search("learner rank [01] was lost", said)
    assert "resume=auto" in said
    assert "Traceback" not in said
    resumed = Launch(runs / "killed", *settings, "resume=auto")
    assert "resuming after step" in resumed.finish()
    steps = metrics(runs / "killed")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    lines = (runs / "killed" / "rollouts.jsonl").read_text().splitlines()
    groups = Counter(row["index"] for row in map(json.loads, lines))
    assert groups == Counter(range(6 * 4))  # each group once, whoever sampled it
    for ours, theirs in zip(steps, metrics(local), strict=True):
        assert ours["reward/mean"] == pytest.approx(theirs["reward/mean"], abs=1e-6)
