"""Runs on several machines: one that is cut off, or killed with its Ray node, costs no group."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.machines import Loopback, Machines, Network, why_no_namespaces
from tests.integration.processes import wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
    # a shell of Ray's own is given the interpreter's path without quotes; rlmed's runs do not start
    # Ray so
    pytest.mark.skipif(
        " " in sys.executable, reason="`ray start` does not work from a folder with a space in its name"
    ),
]
STEPS, GROUPS_PER_STEP = 6, 4
LAST = STEPS - 1
"""Runs stand still before the steps 3 and `LAST`, so no machine is too fast for the events."""
DIE = Path(__file__).with_name("launch_and_die.py")
TRAINING = (
    "+experiment=medvqa_600",
    "profile=tiny",
    f"steps={STEPS}",
    f"algo.groups_per_step={GROUPS_PER_STEP}",
    "algo.group_size=4",
    "algo.dynamic_sampling=false",
    "preflight.enabled=false",
    "eval.at_start=false",
    "eval.at_end=false",
    "rollout.max_tokens=40",
    "data.limit=40",
    "data.eval=[outputs/phantom-0/test_mri.jsonl]",
    "data.leakage=off",
    "cluster=ray",
    "cluster.rollout_workers=2",
    "cluster.threads=1",
    "cluster.silence_timeout_s=5",
)
SETTINGS = (
    *TRAINING,
    "cluster.address=auto",
    "+cluster.worker_resources.sampling=1",
    "+cluster.learner_resources.learning=1",
)


class Run:
    """A run that is started on the head, with other settings where they are given."""

    def __init__(self, machines: Machines, folder: Path, *overrides: str, waits: str | None = None) -> None:
        """`waits`: steps before which it stands still until `go_on`."""
        self.folder, self.sign, self._output = folder, folder / "waits", folder.with_suffix(".log")
        start = ["-m", "rlmed.launch"] if waits is None else [str(DIE), f"wait:{waits}"]
        environment = machines.environment(0)
        if "cluster.address=null" in overrides:
            del environment["RAY_ADDRESS"]
        with self._output.open("w") as file:
            self.process = subprocess.Popen(
                [
                    *machines.network.inside(0),
                    sys.executable,
                    *start,
                    *(overrides or SETTINGS),
                    f"hydra.run.dir={folder}",
                ],
                env=environment,
                cwd=folder.parent,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def metrics(self) -> list[dict[str, float]]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until_it_waits(self) -> None:
        self.wait_until(self.sign.exists, "the next step to wait at")

    def go_on(self) -> None:
        self.sign.unlink()

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """While it runs."""
        wait_until(lambda: condition() or self.process.poll() is not None, 240, what)
        assert self.process.poll() is None, self.output

    def finish(self) -> None:
        """Wait for its end; every group was counted once."""
        assert self.process.wait(timeout=240) == 0, self.output
        assert [line["step"] for line in self.metrics()] == list(range(1, STEPS + 1))
        rows = map(json.loads, (self.folder / "rollouts.jsonl").read_text().splitlines())
        assert Counter(row["index"] for row in rows) == Counter(range(STEPS * GROUPS_PER_STEP))


@pytest.fixture
def workplace(tmp_path: Path, with_images: Callable[[Path], Path]) -> Path:
    return with_images(tmp_path)


@pytest.fixture
def three_machines() -> Iterator[Machines]:
    if reason := why_no_namespaces():
        pytest.skip(reason)
    with Machines(3, Network(3)) as machines:
        yield machines


@pytest.fixture
def three_nodes() -> Iterator[Machines]:
    with Machines(3, Loopback()) as machines:
        yield machines


def both_sample(machines: Machines) -> bool:
    return all(machines.running(number, "ray::RolloutActor") for number in (1, 2))


def test_a_machine_that_is_cut_off_costs_no_group(three_machines: Machines, workplace: Path) -> None:
    run = Run(three_machines, workplace / "run", waits=f"3,{LAST}")
    run.until_it_waits()
    assert both_sample(three_machines)
    assert not three_machines.running(0, "ray::RolloutActor")
    assert three_machines.running(0, "ray::LearnerActor")
    three_machines.network.cut(2)
    run.go_on()
    run.until_it_waits()
    run.wait_until(lambda: "Lost rollout worker" in run.output, "its loss is noticed")
    run.go_on()
    run.finish()
    assert three_machines.running(2, "raylet")  # nobody has killed anything there
    last = run.metrics()[-1]
    assert last["rollout/workers_lost"] >= 1
    assert last["rollout/workers_ready"] == 1
    assert re.search(r"Lost rollout worker \d \(.*\):", run.output), run.output


def test_a_killed_node_costs_no_group_and_after_a_lost_head_the_same_command_goes_on(
    three_nodes: Machines, workplace: Path
) -> None:
    """The head's own process is killed; its node goes on for a minute, as on another machine."""
    run = Run(three_nodes, workplace / "run", *SETTINGS, "checkpoint.every=1", waits=f"3,{LAST}")
    run.until_it_waits()
    assert both_sample(three_nodes)
    three_nodes.kill(2)
    run.go_on()
    run.until_it_waits()
    assert run.metrics()[-1]["rollout/workers_lost"] >= 1
    assert run.metrics()[-1]["rollout/workers_ready"] == 1
    # `ray start --block` would end the node, and Ray the run, at once
    for pid in three_nodes.running(0, "bin/ray"):
        os.kill(pid, signal.SIGSTOP)
    for pid in three_nodes.running(0, "gcs_server"):
        os.kill(pid, signal.SIGKILL)
    assert run.process.wait(timeout=240) == 3, run.output
    run.go_on()
    assert re.search(r"error: lost the Ray head .* resume=auto", run.output)
    assert "Traceback" not in run.output
    alone = (*TRAINING, "checkpoint.every=1", "cluster.address=null", "cluster.rollout_workers=1", "resume=auto")
    resumed = Run(three_nodes, workplace / "run", *alone)
    resumed.finish()
    assert "resuming after step" in resumed.output
