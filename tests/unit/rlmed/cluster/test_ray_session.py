"""The watch of a cluster's head, on a real socket."""

from __future__ import annotations

import importlib.util
import pkgutil
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from rlmed.cluster.capacity import Machine
from rlmed.core.config.composing import compose_config
from rlmed.core.plugins import FOLDER, own_folders
from rlmed.core.process.starting import prepare_worker

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")


def test_a_head_that_stops_listening_ends_the_process_with_the_command_that_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rlmed.cluster.ray_session import HeadWatch

    ended: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        watch = HeadWatch(address, limit_s=0.5, end=ended.append)
        watch.start()
        head.settimeout(60)
        for _ in range(3):  # it knocks again and again
            head.accept()[0].close()
        assert watch.is_alive()
        assert ended == []
    watch.join(timeout=60)
    assert ended == [3]
    said = capsys.readouterr().err
    assert f"the Ray head node at {address}" in said
    assert "the same command with resume=auto" in said


def test_a_run_that_has_ended_is_not_ended_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends during the very knock that would have been the last."""
    from rlmed.cluster import ray_session

    ended: list[int] = []
    watch = ray_session.HeadWatch("127.0.0.1:1", limit_s=0.0, end=ended.append)

    def refused(address: str, timeout_s: float) -> None:
        watch.stop()
        raise ConnectionError("refused")

    monkeypatch.setattr(ray_session, "_check_listens", refused)
    watch.run()
    assert ended == []


OURS = {"py_executable": "'/my environment/python'"}


@pytest.mark.parametrize(
    ("chosen", "here", "interpreter"),
    [
        ({}, True, OURS),
        ({"env_vars": {"A": "b"}}, True, OURS),
        ({"py_executable": "valgrind python"}, True, {}),
        ({"pip": ["a"]}, True, {}),
        ({"conda": "a"}, True, {}),
        ({"uv": ["a"]}, True, {}),
        # another node has another path
        ({}, False, {}),
    ],
)
def test_each_worker_is_prepared_and_runs_this_processs_interpreter_or_the_chosen_one(
    chosen: dict[str, Any], here: bool, interpreter: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlmed.cluster.ray_session import worker_environment

    monkeypatch.setattr(sys, "executable", "/my environment/python")
    given = worker_environment(chosen, here=here)
    assert pkgutil.resolve_name(given.pop("worker_process_setup_hook")) is prepare_worker
    if not here:
        given.pop("env_vars")
    assert given == {**interpreter, **chosen}


def test_workers_of_a_cluster_that_was_there_learn_where_the_runs_own_modules_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlmed.cluster.ray_session import worker_environment

    for folder in ("run", "cluster", "mine: 12/conf"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setenv(FOLDER, str(tmp_path / "mine: 12"))
    given = worker_environment({"env_vars": {"A": "b"}}, here=False)["env_vars"]
    assert given["A"] == "b"
    monkeypatch.delenv(FOLDER)
    monkeypatch.chdir(tmp_path / "cluster")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert [Path(folder).name for folder in own_folders()] == ["run", "mine: 12", "cluster"]


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_cluster_that_already_runs_keeps_its_own_interpreters(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlmed.cluster import ray_session

    given: dict[str, Any] = {}

    def init(**options: Any) -> None:
        given.update(options)
        raise RuntimeError("not started here")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_session.ray, "init", init)
    config = compose_config("train", ["cluster=ray", f"cluster.address={address or 'null'}"]).cluster
    with pytest.raises(RuntimeError, match="not started here"):
        ray_session.start_ray(config)
    assert ("py_executable" in given["runtime_env"]) == (address is None)


def test_a_setup_hook_of_the_users_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cluster\.runtime_env\.worker_process_setup_hook .*remove it"):
        compose_config("train", ["cluster=ray", "+cluster.runtime_env.worker_process_setup_hook=a.b"])


class Nodes:
    """A cluster of two nodes, of which the second has less memory; placed in turn."""

    strategies: ClassVar[list[str]] = []

    @classmethod
    def place(cls, monkeypatch: pytest.MonkeyPatch, alive: int) -> None:
        from rlmed.cluster import ray_session

        def group(bundles: list[Any], strategy: str) -> Any:
            cls.strategies.append(strategy)
            return SimpleNamespace(ready=lambda: "ready", bundles=len(bundles))

        def remote(**_: Any) -> Any:
            return lambda function: SimpleNamespace(
                options=lambda scheduling_strategy: SimpleNamespace(
                    remote=lambda processes: (scheduling_strategy.node_id, processes)
                )
            )

        cls.strategies = []
        nodes = [{"NodeID": f"{i:056x}", "NodeManagerAddress": f"10.0.0.{i}", "Alive": i < alive} for i in range(3)]
        for name, value in {
            "nodes": lambda: nodes,
            "wait": lambda refs, timeout: (refs, []),
            "remote": remote,
            "get": lambda asked: 1000 * (1 + int(asked[0], 16)) + asked[1],
        }.items():
            monkeypatch.setattr(ray_session.ray, name, value)
        monkeypatch.setattr(ray_session, "placement_group", group)
        monkeypatch.setattr(
            ray_session,
            "PlacementGroupSchedulingStrategy",
            lambda group, placement_group_bundle_index: SimpleNamespace(
                placement_group=group, placement_group_bundle_index=placement_group_bundle_index
            ),
        )
        monkeypatch.setattr(
            ray_session,
            "placement_group_table",
            lambda group: {"bundles_to_node_id": {i: nodes[i % alive]["NodeID"] for i in range(group.bundles)}},
        )
        monkeypatch.setattr(ray_session, "available_memory", lambda processes: 77 + processes)


def placed(*overrides: str) -> list[Machine]:
    from rlmed.cluster.ray_session import machines_of, place_actors

    settings = compose_config("train", ["cluster=ray", "cluster.learner_ranks=2", *overrides]).cluster
    return machines_of(*place_actors(settings, ExitStack(), cuda=False, gpus_per_engine=1, learns=True))


def test_on_one_machine_all_processes_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this run has started Ray or joins it; lost nodes do not count."""
    Nodes.place(monkeypatch, alive=1)
    assert placed("cluster.rollout_workers=3") == [Machine("this machine", 2, 3, 82)]
    assert Nodes.strategies == []


@pytest.mark.parametrize(
    ("overrides", "strategy"), [((), "SPREAD"), (("+cluster.worker_resources.sampling=1",), "PACK")]
)
def test_on_a_cluster_each_node_has_its_processes(
    overrides: tuple[str, ...], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Nodes.place(monkeypatch, alive=2)
    assert placed("cluster.rollout_workers=3", *overrides) == [
        Machine("node 10.0.0.0", 1, 2, 1003),
        Machine("node 10.0.0.1", 1, 1, 2002),
    ]
    assert Nodes.strategies == [strategy]
