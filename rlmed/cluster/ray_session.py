"""Join or start Ray for one run, and reserve its actors' resources.

Import only if Ray is installed.
"""

from __future__ import annotations

import copy
import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlmed.cluster.capacity import Machine
from rlmed.core.config.running import ClusterConfig
from rlmed.core.files.exclusive import OWNER_FILE, FolderInUseError, hold
from rlmed.core.plugins import environment_of_workers
from rlmed.core.process.threads import available_memory
from rlmed.core.protocols import LOST, ClusterError

RAY_FOLDER = "rlmed-ray-"
"""Prefix of the temporary folder of a Ray started for one run."""
HEAD_SILENCE_S = 20.0
"""Seconds without contact after which the head counts as lost."""
LONGEST_ROOT = 24
"""Longest path of the folder around Ray's: the path of a socket has 83 more, of at most 107."""


def worker_environment(chosen: Mapping[str, Any], *, here: bool) -> dict[str, Any]:
    """Return Ray's runtime environment for the workers: ours and the user's.

    Args:
        chosen: `cluster.runtime_env`.
        here: whether all workers run on this machine, with this process's interpreter unless
            `chosen` says otherwise.
    """
    # called in each worker before it imports torch
    environment: dict[str, Any] = {"worker_process_setup_hook": "rlmed.core.process.starting.prepare_worker"}
    # for these keys Ray makes an interpreter of its own, which ours would replace
    if here and not chosen.keys() & {"conda", "pip", "uv"}:
        # Ray gives it to a shell, by default without quotes: with a space in its path, workers
        # would never start
        environment["py_executable"] = shlex.quote(sys.executable)
    if not here:  # they have the environment and the working directory of `ray start`
        environment["env_vars"] = {**environment_of_workers(), **(chosen.get("env_vars") or {})}
        chosen = {key: value for key, value in chosen.items() if key != "env_vars"}
    return copy.deepcopy({**environment, **chosen})  # Ray changes it


def start_ray(cluster: ClusterConfig) -> Callable[[], None]:
    """Join the Ray cluster named by `cluster.address` or the environment, or start one here.

    Returns:
        A function that disconnects and stops what was started; a cluster that already existed keeps
        running.
    """
    if ray.is_initialized():
        return lambda: None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # no process per core in advance: ours have an environment of their own and could not use them
    os.environ.setdefault("RAY_prestart_worker_first_driver", "false")
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "log_to_driver": cluster.worker_logs,
        "logging_level": logging.ERROR,
        "runtime_env": worker_environment(cluster.runtime_env, here=not address),
        "namespace": "rlmed",
    }
    if address:
        try:
            _check_listens(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise ConnectionError(
                f"no Ray cluster answers at cluster.address={address}: {error}. Start one (ray start --head), set "
                "RAY_AUTH_TOKEN if Ray mentions authentication, or use cluster.address=null to start Ray on this machine "
                "only"
            ) from error
        watch = HeadWatch(ray.get_runtime_context().gcs_address)
        watch.start()

        def leave() -> None:
            watch.stop()
            ray.shutdown()

        return leave
    return _start_own_ray(options)


def _start_own_ray(options: dict[str, Any]) -> Callable[[], None]:
    """Start Ray for this run alone, in a temporary folder that is removed with it.

    This process holds the folder while it lives, so that leftovers of killed runs can be told from
    folders in use.
    """
    root = Path(tempfile.gettempdir())
    root = root if len(str(root)) <= LONGEST_ROOT else Path("/tmp")
    for owner_file in root.glob(f"{RAY_FOLDER}*/{OWNER_FILE}"):
        with suppress(FolderInUseError, OSError), hold(owner_file.parent):
            shutil.rmtree(owner_file.parent, ignore_errors=True)
    with ExitStack() as stack:
        # give it its final name only once it is held
        new = Path(tempfile.mkdtemp(prefix=f".{RAY_FOLDER}", dir=root))
        stack.enter_context(hold(new))
        folder = new.rename(new.with_name(new.name.removeprefix(".")))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), **options)
        stack.callback(ray.shutdown)
        return stack.pop_all().close


class HeadWatch(threading.Thread):
    """When the cluster's head stops listening, exit with a message and the lost processes' status.

    Ray itself retries for a minute, then kills the process silently. Nothing is cleaned up: every
    Ray call would wait for the head, and a resumed run needs only its last checkpoint.
    """

    def __init__(self, address: str, *, limit_s: float = HEAD_SILENCE_S, end: Callable[[int], Any] = os._exit) -> None:
        """Watch HOST:PORT; call `end` with the exit status after `limit_s` seconds unconnected."""
        super().__init__(name="watch of Ray's head", daemon=True)
        self._address, self._limit_s, self._end, self._stopped = address, limit_s, end, threading.Event()

    def run(self) -> None:
        """Probe the head until stopped."""
        heard = time.monotonic()
        while not self._stopped.wait(self._limit_s / 10):
            try:
                _check_listens(self._address, timeout_s=self._limit_s / 2)
                heard = time.monotonic()
            except ConnectionError as error:
                if time.monotonic() - heard > self._limit_s and not self._stopped.is_set():
                    print(  # noqa: T201  # the log may be on its way to the head
                        f"\nerror: lost the Ray head node at {self._address}: no answer for {self._limit_s:.0f} s "
                        f"({error}). Restart Ray (ray start --head on one machine, ray start --address on the others), then "
                        "continue from the last checkpoint: run the same command with resume=auto",
                        file=sys.stderr,
                        flush=True,
                    )
                    self._end(LOST)
                    return

    def stop(self) -> None:
        """Stop watching at the end of the run."""
        self._stopped.set()


def _check_listens(address: str, timeout_s: float = 10.0) -> None:
    """Raise ConnectionError at once if nothing listens at HOST:PORT; Ray would retry 15 minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "://" not in address:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
        except OSError as error:
            raise ConnectionError(str(error)) from error


def place_actors(
    cluster: ClusterConfig, resources: ExitStack, *, cuda: bool, gpus_per_engine: int, learns: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reserve all actors' resources or none; return options of each learner rank, rollout worker.

    Args:
        cluster: numbers of actors, and what each requests.
        resources: closing it releases the reservation.
        cuda: whether the actors use GPUs.
        gpus_per_engine: GPUs of a rollout worker, unless `cluster` says otherwise.
        learns: whether there are learner ranks.

    Raises:
        ClusterError: if the cluster cannot provide them within `cluster.start_timeout_s`.
    """
    own = (float(cuda), float(gpus_per_engine if cuda else 0))
    asked = (cluster.gpus_per_rank, cluster.gpus_per_worker)
    gpus = [default if value is None else value for default, value in zip(own, asked, strict=True)]
    custom = (dict(cluster.learner_resources), dict(cluster.worker_resources))
    options: list[dict[str, Any]] = [
        {"num_gpus": count, "resources": names} for count, names in zip(gpus, custom, strict=True)
    ]
    ranks, workers = cluster.learner_ranks if learns else 0, cluster.rollout_workers
    scarce = any(gpus) or any(custom)
    if not scarce and sum(node["Alive"] for node in ray.nodes()) == 1:
        return [options[0]] * ranks, [options[1]] * workers
    needs = [options[0]] * ranks + [options[1]] * workers
    bundles = [
        {"CPU": 0.001, **({"GPU": need["num_gpus"]} if need["num_gpus"] else {}), **need["resources"]} for need in needs
    ]
    group = placement_group(bundles, strategy="PACK" if scarce else "SPREAD")
    resources.callback(remove_placement_group, group)
    if not ray.wait([group.ready()], timeout=cluster.start_timeout_s)[0]:
        raise ClusterError(
            f"the cluster did not provide {options[0]} for {ranks} learner ranks and {options[1]} for {workers} rollout "
            f"workers within {cluster.start_timeout_s:.0f} s; it has {ray.cluster_resources()}, of which "
            f"{ray.available_resources()} are free. Add nodes, end other jobs, or request less (cluster.rollout_workers, "
            "cluster.learner_ranks, cluster.*_gpus)"
        )
    placed = [
        {**need, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}
        for index, need in enumerate(needs)
    ]
    return placed[:ranks], placed[ranks:]


def machines_of(ranks: Sequence[Mapping[str, Any]], workers: Sequence[Mapping[str, Any]]) -> list[Machine]:
    """Return the machines of ranks and workers with these options of `place_actors`."""
    learning, sampling = (Counter(map(_node_of, options)) for options in (ranks, workers))
    nodes = list(learning | sampling)
    names = {node["NodeID"]: f"node {node['NodeManagerAddress']}" for node in ray.nodes()} if any(nodes) else {}
    probe = ray.remote(num_cpus=0)(available_memory)
    machines = []
    for node in nodes:
        count = learning[node] + sampling[node]
        if node is None:
            available = available_memory(processes=count)
        else:
            there = probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            available = ray.get(there.remote(processes=count))
        machines.append(Machine(names[node] if node else "this machine", learning[node], sampling[node], available))
    return machines


def _node_of(options: Mapping[str, Any]) -> str | None:
    """Return the id of the node where an actor is placed; None for the only one."""
    placed = options.get("scheduling_strategy")
    if placed is None:
        return None
    nodes = placement_group_table(placed.placement_group)["bundles_to_node_id"]
    return str(nodes[placed.placement_group_bundle_index])


def on_gpus(device: str) -> bool:
    """Return whether `model.device` gives actors GPUs; on a cluster, this process may have none."""
    if device == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    return device != "cpu"
