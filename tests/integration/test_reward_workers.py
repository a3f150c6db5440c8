"""Reward functions in Ray's processes: hung, killed, or without room."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.deadline import DeadlineError
from rewards.extra import RewardError, load_reward
from rewards.processes import Processes
from rewards.slow import RewardUnavailableError
from rlmed.core.plugins import FOLDER
from tests.unit.rewards.groups import group_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
]
PATIENT = 120.0
MODULE = """
import os, re, signal
from pathlib import Path
from rlmed.tasks.registry import task_of

def own(example, completion):
    match completion.text:
        case "hang": re.fullmatch("(a+)+b", "a" * 60)
        case "die": os.kill(os.getpid(), signal.SIGKILL)
        case "read": return float(Path("number").read_text())
        case "key": raise KeyError("score")
        case "task": return task_of(example).name == "choice"
    return os.getpid()
"""


@pytest.fixture
def make_processes(ray_session: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from rewards.actor import RayRewardProcess

    (tmp_path / "own_of_ray.py").write_text(MODULE)
    (tmp_path / "number").write_text("0.25")
    monkeypatch.chdir(tmp_path)
    made = []

    def make(cpus: float, start_s: float) -> Processes:
        made.append(Processes(lambda slot: RayRewardProcess(prepare, cpus=cpus), 1, start_s=start_s))
        return made[-1]

    yield make
    for processes in made:
        processes.close()


def prepare() -> None: ...


def test_a_process_of_ray_works_in_the_driver_s_folder_and_is_replaced(
    make_processes: Callable[..., Processes],
) -> None:
    own = make_processes(0.5, PATIENT).caller("own_of_ray:own", batched=False)

    def call(text: str, seconds: float = PATIENT) -> Any:
        group = group_of([text])
        return own(seconds, [group.prompt.example], group.completions, lambda: None)[0]

    assert call("read") == 0.25
    assert call("task") is True
    first = call("which")
    assert first != os.getpid()
    with pytest.raises(KeyError, match="score"):
        call("key")
    assert call("which") == first
    with pytest.raises(RewardUnavailableError, match=f"process {first}. was lost"):
        call("die")
    second = call("which")
    assert second != first
    with pytest.raises(DeadlineError):  # it holds the interpreter, so nothing in it could end it
        call("hang", 0.5)
    assert call("which") not in (first, second)


def documents(names: list[str]) -> list[str]:
    return [load_reward(name).__doc__ or "" for name in names]


def test_a_worker_of_a_cluster_that_was_there_finds_the_run_s_own_modules(
    ray_session: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from rlmed.cluster.ray_session import worker_environment

    for name in ("beside", "work"):
        (tmp_path / name).mkdir()
        text = f"def own(example, completion):\n    '{name}'\n"
        (tmp_path / name / f"{name}_of_ray.py").write_text(text)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv(FOLDER, str(tmp_path / "beside"))
    variables = worker_environment({}, here=False)["env_vars"]  # the rest was settled when Ray started
    there = ray.remote(num_cpus=0, runtime_env={"env_vars": variables})(documents)
    names = ["beside_of_ray:own", "work_of_ray:own"]
    assert ray.get(there.remote(names), timeout=PATIENT) == ["beside", "work"]


def test_without_cores_for_it_the_run_ends_with_what_to_set(make_processes: Callable[..., Processes]) -> None:
    group = group_of(["which"])
    with pytest.raises(RewardError, match=r"reward\.slow\.worker_cpus"):
        make_processes(64.0, 1.0).caller("own_of_ray:own", batched=False)(
            1.0, [group.prompt.example], group.completions, lambda: None
        )
