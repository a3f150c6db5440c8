"""`rlmed.launch` with cluster=ray: one process's numbers, lost processes."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration import launch_and_die
from tests.integration.forked import Forked
from tests.integration.processes import marked, new_mark, wait_until
from tests.integration.same_training import assert_same_training, read_lines
from tests.integration.short_run import SHORT_RUN, STEPS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
]
# at a small learning rate a completion that rounding decides does not change most of those after it
SETTINGS = (*SHORT_RUN, "algo.dynamic_sampling=false", "reward=reasoning", "learner.lr=1e-4")


class Launch:
    """A run in a process of its own whose descendants can be found."""

    def __init__(self, folder: Path, *overrides: str, waits: str | None = None, temporary: Path | None = None) -> None:
        """`waits`: steps before which it stands still until `go_on`, as "2,4", on any machine."""
        self.folder, self.sign, self.mark = folder, folder / "waits", new_mark()
        environment = self.mark | ({} if temporary is None else {"TMPDIR": str(temporary)})
        place = "nowhere" if waits is None else f"wait:{waits}"
        arguments = [place, *SETTINGS, f"hydra.run.dir={folder}", *overrides]
        self.process = Forked(launch_and_die.main, arguments, folder.parent, environment)

    def finish(self, status: int = 0) -> str:
        """Wait for its end, which must have this exit status; nothing of it may be left running."""
        done = self.process.finish()
        assert done.returncode == status, done.output
        wait_until(lambda: not marked(self.mark), 120, "all processes of the run end")
        return done.output

    def victims(self, title: str) -> list[int]:
        return marked(self.mark, title)

    def until_it_waits(self) -> None:
        wait_until(lambda: self.sign.exists() or self.process.returncode is not None, 240, "the next step to wait at")
        assert self.process.returncode is None, self.process.output

    def go_on(self) -> None:
        self.sign.unlink()


def metrics(folder: Path) -> list[dict[str, float]]:
    return read_lines(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, with_images: Callable[[Path], Path]) -> Path:
    return with_images(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """Where runs put temporary files: pytest's folder names are too long for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def local(runs: Path) -> Path:
    Launch(runs / "local").finish()
    return runs / "local"


def test_a_killed_run_leaves_no_actors_and_goes_on_as_a_single_process_would(
    runs: Path, local: Path, temporary: Path
) -> None:
    """Agents of Ray's own may go on for about a minute, until they notice that they are alone."""
    settings = ("cluster=ray", "cluster.threads=1")
    run = Launch(runs / "gone", *settings, waits="3", temporary=temporary)
    run.until_it_waits()
    assert len(run.victims("Actor")) == 2
    run.process.kill()
    run.go_on()
    wait_until(lambda: not run.victims("Actor"), 120, "the actors of the killed run end")
    assert len(list(temporary.glob("rlmed-ray-*"))) == 1
    Launch(runs / "gone", *settings, "resume=auto", temporary=temporary).finish()
    # neither its own folder is left nor that of the killed one
    assert not list(temporary.glob("rlmed-ray-*"))
    assert_same_training(runs / "gone", local, last=STEPS, before=STEPS - 2)


def test_a_killed_worker_costs_no_group_and_a_killed_rank_is_resumed_with_one_command(runs: Path, local: Path) -> None:
    """Two workers and two ranks, one of each dies; the run goes on with one of each."""
    settings = ("cluster=ray", "cluster.threads=1")
    several = ("cluster.rollout_workers=2", "cluster.learner_ranks=2")
    run = Launch(runs / "killed", *settings, *several, waits="2,4")
    run.until_it_waits()
    os.kill(run.victims("ray::RolloutActor")[0], signal.SIGKILL)
    run.go_on()
    run.until_it_waits()
    os.kill(run.victims("ray::LearnerActor")[1], signal.SIGKILL)
    run.go_on()
    said = run.finish(status=3)
    assert re.search("lost learner rank [01]", said)
    assert "resume=auto" in said
    assert "Traceback" not in said
    resumed = Launch(runs / "killed", *settings, "resume=auto")
    assert "resuming after step" in resumed.finish()
    assert [line["step"] for line in metrics(runs / "killed")] == [1, 2, 3, 4, 5, 6]
    groups = Counter(row["index"] for row in read_lines(runs / "killed" / "rollouts.jsonl"))
    assert groups == Counter(range(6 * 4))  # each group once, from any worker
    assert_same_training(runs / "killed", local, last=STEPS, before=STEPS - 2)


JUDGING = """
import hashlib
import os
import signal
from pathlib import Path

from rewards.slow import slow


@slow(concurrency=2, retries=1)
def opinion(example, completion):
    Path(f"judged-by-{os.getpid()}").touch()
    try:
        Path("one-dies").unlink()
    except FileNotFoundError:
        return hashlib.sha256((example.id + completion.text).encode()).digest()[0] / 255
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_rewards_in_workers_of_which_one_is_killed_are_those_of_threads(runs: Path) -> None:
    (runs / "own_judging.py").write_text(JUDGING)
    judged = ("reward.extra=[own_judging:opinion]", "reward.slow.wait_s=0.01", "steps=4")
    Launch(runs / "threads", *judged).finish()
    assert len(list(runs.glob("judged-by-*"))) == 1

    workers = ("cluster=ray", "cluster.threads=1", "reward.slow.workers=2", "reward.slow.worker_cpus=0.5")
    run = Launch(runs / "workers", *judged, *workers, waits="2")
    run.until_it_waits()
    (runs / "one-dies").touch()
    run.go_on()
    assert "was lost, and is replaced" in run.finish()
    assert len(list(runs.glob("judged-by-*"))) == 1 + 3  # two, and the one in the place of the killed one

    assert_same_training(runs / "workers", runs / "threads", last=4, before=2)
    opinions: dict[tuple[str, str], set[float]] = {}
    for folder in ("threads", "workers"):
        for row in read_lines(runs / folder / "rollouts.jsonl"):
            for entry in row["completions"]:
                value = entry["reward_parts"]["opinion"]
                opinions.setdefault((row["example_id"], entry["text"]), set()).add(value)
    assert all(len(values) == 1 for values in opinions.values())
    asked = read_lines(runs / "workers" / "rewards.jsonl")
    keys = [key for line in asked for key in line["values"]]
    texts = {
        (row["example_id"], entry["text"])
        for row in read_lines(runs / "workers" / "rollouts.jsonl")
        for entry in row["completions"]
    }
    assert len(keys) == len(set(keys)) == len(texts)
    assert sum(line["calls"] for line in asked) == len(keys) + 1
