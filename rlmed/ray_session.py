"""Ray for one run: joined or started, and what its actors need reserved. Imported where Ray is installed only."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlmed.commandline import LOST
from rlmed.core.config import RunConfig
from rlmed.core.holding import OWNER_FILE, FolderInUseError, hold
from rlmed.core.protocols import ClusterError

RAY_FOLDER = "rlmed-ray-"
"""Begins the name of the temporary folder of a Ray that was started for one run."""
HEAD_SILENCE_S = 20.0
"""A head that nobody has reached for so long is gone."""
LONGEST_ROOT = 30
"""Characters of a folder that Ray's own may be in: its sockets are in there, and a socket's path may have about a hundred."""


def start_ray(config: RunConfig) -> Callable[[], None]:
    """Join the Ray cluster that `cluster.address` or the environment names, or start one here.

    Returns:
        What ends it again; a cluster that was there before goes on.
    """
    if ray.is_initialized():
        return lambda: None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {
        "log_to_driver": config.cluster.worker_logs,
        "logging_level": logging.ERROR,
        "runtime_env": dict(config.cluster.runtime_env) or None,
        "namespace": "rlmed",
    }
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _check_listens(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise ConnectionError(
                f"no Ray cluster answers at cluster.address={address}: {error}. Start one (ray start --head), give this "
                "process its token (RAY_AUTH_TOKEN) where Ray speaks of authentication, or leave cluster.address=null to "
                "start Ray on this machine alone"
            ) from error
        watch = HeadWatch(ray.get_runtime_context().gcs_address)
        watch.start()

        def leave() -> None:
            watch.stop()
            ray.shutdown()

        return leave
    return _start_own_ray(options)


def _start_own_ray(options: dict[str, Any]) -> Callable[[], None]:
    """A Ray of this run alone, in a temporary folder that is gone with it.

    The folder is held for as long as this process lives, so that those of killed runs are told from those in use.
    """
    root = Path(tempfile.gettempdir())
    root = root if len(str(root)) <= LONGEST_ROOT else Path("/tmp")
    for owner_file in root.glob(f"{RAY_FOLDER}*/{OWNER_FILE}"):
        with suppress(FolderInUseError, OSError), hold(owner_file.parent):
            shutil.rmtree(owner_file.parent, ignore_errors=True)
    with ExitStack() as stack:
        # its name is one of a folder in use only once it is in use
        new = Path(tempfile.mkdtemp(prefix=f".{RAY_FOLDER}", dir=root))
        stack.enter_context(hold(new))
        folder = new.rename(new.with_name(new.name.removeprefix(".")))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), **options)
        stack.callback(ray.shutdown)
        return stack.pop_all().close


class HeadWatch(threading.Thread):
    """Ends this process when the cluster's head does not listen any more, with what to do and the status of lost processes.

    Ray itself tries to reach it for a minute, and then ends the process without a word. Nothing is cleaned up: every call of
    Ray's would wait for the head, and a resumed run needs no more than its last checkpoint.
    """

    def __init__(self, address: str, *, limit_s: float = HEAD_SILENCE_S, end: Callable[[int], Any] = os._exit) -> None:
        """Watch HOST:PORT; `end` is called with the exit status after `limit_s` seconds without a connection."""
        super().__init__(name="watch of Ray's head", daemon=True)
        self._address, self._limit_s, self._end, self._stopped = address, limit_s, end, threading.Event()

    def run(self) -> None:
        """Knock again and again."""
        heard = time.monotonic()
        while not self._stopped.wait(self._limit_s / 10):
            try:
                _check_listens(self._address, timeout_s=self._limit_s / 2)
                heard = time.monotonic()
            except ConnectionError as error:
                if time.monotonic() - heard > self._limit_s and not self._stopped.is_set():
                    print(  # noqa: T201  # the log may be on its way to the head
                        f"\nerror: the head of the Ray cluster ({self._address}) has not answered for {self._limit_s:.0f} s "
                        f"({error}), and no run goes on without it. Start Ray again (ray start --head on one machine, "
                        "ray start --address on the others), then go on from the last checkpoint: the same command with "
                        "resume=auto",
                        file=sys.stderr,
                        flush=True,
                    )
                    self._end(LOST)
                    return

    def stop(self) -> None:
        """The run has ended."""
        self._stopped.set()


def _check_listens(address: str, timeout_s: float = 10.0) -> None:
    """Fail at once where nothing listens at HOST:PORT; Ray would try for a quarter of an hour."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "://" not in address:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
        except OSError as error:
            raise ConnectionError(str(error)) from error


def place_actors(config: RunConfig, resources: ExitStack) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reserve what the actors need, all or nothing, and give the options of each learner rank and rollout worker.

    Raises:
        ClusterError: when the cluster does not have it within `cluster.start_timeout_s`.
    """
    cluster, cuda = config.cluster, on_gpus(config)
    own = (float(cuda), float(config.rollout.tensor_parallel_size if cuda else 0))
    asked = (cluster.learner_gpus, cluster.worker_gpus)
    gpus = [default if value is None else value for default, value in zip(own, asked, strict=True)]
    custom = (dict(cluster.learner_resources), dict(cluster.worker_resources))
    options = [{"num_gpus": count, "resources": names} for count, names in zip(gpus, custom, strict=True)]
    ranks, workers = cluster.learner_ranks if config.debug.learn else 0, cluster.rollout_workers
    if not any(gpus) and not any(custom):  # there is nothing to run out of
        return [options[0]] * ranks, [options[1]] * workers
    needs = [options[0]] * ranks + [options[1]] * workers
    bundles = [
        {"CPU": 0.001, **({"GPU": need["num_gpus"]} if need["num_gpus"] else {}), **need["resources"]} for need in needs
    ]
    group = placement_group(bundles, strategy="PACK")
    resources.callback(remove_placement_group, group)
    if not ray.wait([group.ready()], timeout=cluster.start_timeout_s)[0]:
        raise ClusterError(
            f"the cluster has not given {ranks} learner ranks {options[0]} and {workers} rollout workers {options[1]} within "
            f"{cluster.start_timeout_s:.0f} s; it has {ray.cluster_resources()}, free of these {ray.available_resources()}. "
            "Add nodes, end other jobs, or ask for less (cluster.rollout_workers, cluster.learner_ranks, cluster.*_gpus)"
        )
    placed = [
        {**need, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}
        for index, need in enumerate(needs)
    ]
    return placed[:ranks], placed[ranks:]


def on_gpus(config: RunConfig) -> bool:
    """Whether the actors use GPUs; this process, on a cluster, may have none itself."""
    if config.model.device == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.model.device != "cpu"
