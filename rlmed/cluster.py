"""Where the parts run: `cluster=local` in this process on the same parameters, `cluster=ray` in actors."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.distributed import Ranks
from learner.learner import PolicyLearner
from rlmed.core.config import RunConfig
from rlmed.core.protocols import ClusterError, Learner, RolloutPool
from rlmed.core.types import TrainGroup
from rlmed.data.prompts import PromptRenderer
from rlmed.debug import NoLearner, RecordedPool
from rlmed.engines import build_engine, build_local_pool, build_policy
from rlmed.memory import estimate
from rlmed.models.policy import Policy
from rlmed.setup import EMBEDDED, model_folder
from rollout.leases import PoolSettings
from rollout.pool import WorkerPool
from rollout.worker import Worker

if TYPE_CHECKING:
    from learner.actor import RayLearner

log = logging.getLogger(__name__)

RAY_FOLDER = "rlmed-ray-"
"""Begins the name of the temporary folder of a Ray that was started for one run."""
LOCK_FILE = "in-use"
LONGEST_ROOT = 30
Report = Callable[[Sequence[TrainGroup], str], None]
"""Told of a batch that was skipped, and why."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The two parts that the loop drives."""

    pool: RolloutPool
    learner: Learner
    evaluation_pool: RolloutPool
    """Samples from the same weights; training requests in flight are not disturbed by it."""
    resources: ExitStack
    """What is given back by `close`, the newest first."""

    def close(self) -> None:
        """Release all that was made for the run, whatever fails meanwhile; a second call does nothing."""
        self.resources.close()


def build_cluster(
    config: RunConfig, renderer: PromptRenderer, *, checkpoint: Path | None, on_bad_step: Report
) -> Cluster:
    """Pool and learner as `config.cluster` says.

    Args:
        config: the run.
        renderer: its tokenizer turns sampled ids into text.
        checkpoint: load the policy from there instead of `config.model`; the reference is always `config.model`.
        on_bad_step: told of batches that were skipped.

    Raises:
        ValueError: when Ray is asked for and not installed.
        ConnectionError: when there is no Ray cluster at `config.cluster.address`.
    """
    if config.cluster.kind == "ray":
        return _build_ray(config, checkpoint, on_bad_step)
    policy = build_policy(config, checkpoint or model_folder(config.model.path))
    learner = build_learner(config, on_bad_step, policy=policy) if config.debug.learn else NoLearner()
    log.info("%s", estimate(policy, config).line())
    pool: RolloutPool = build_local_pool(config, policy, renderer)
    if config.debug.recorded:
        pool = RecordedPool(Path(config.debug.recorded), pool)
    return _cluster(ExitStack(), pool, learner, build_local_pool(config, policy, renderer))


def _cluster(resources: ExitStack, pool: RolloutPool, learner: Learner, evaluation_pool: RolloutPool) -> Cluster:
    for each in (pool, evaluation_pool):
        resources.callback(each.close)
    return Cluster(pool, learner, evaluation_pool, resources)


def build_learner(
    config: RunConfig,
    on_bad_step: Report,
    ranks: Ranks | None = None,
    *,
    policy: Policy | None = None,
    checkpoint: Path | None = None,
) -> PolicyLearner:
    """The learner in this process, on `policy` or on the one in `checkpoint`; its reference is always `config.model`.

    `ranks` are those that it is one of; None where it is alone.
    """
    base = model_folder(config.model.path)
    policy = policy or build_policy(config, checkpoint or base)
    reference = None
    if config.algo.kl_coef > 0:
        reference = build_policy(config, base)
        reference.model.requires_grad_(False)
    return PolicyLearner(
        policy,
        reference,
        config.algo,
        config.learner,
        total_steps=config.steps,
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        on_bad_step=on_bad_step,
        ranks=ranks,
    )


def _build_ray(config: RunConfig, checkpoint: Path | None, on_bad_step: Report) -> Cluster:
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ValueError("cluster=ray needs Ray: pip install 'rlmed[ray]'") from error
    with ExitStack() as resources:  # given back when anything fails, else handed on
        resources.callback(_start_ray(config))
        rank_options, worker_options = _place(config, resources)
        workers = _start_workers(config, worker_options)
        resources.callback(workers.close)
        pool: RolloutPool = workers.channel()
        if config.debug.recorded:
            pool = RecordedPool(Path(config.debug.recorded), pool)
        learner: Learner = NoLearner()
        if config.debug.learn:
            learner = _start_learner(config, checkpoint, on_bad_step, rank_options)
            resources.callback(learner.close)
        return _cluster(resources.pop_all(), pool, learner, workers.channel())


def _start_workers(config: RunConfig, options: Sequence[dict[str, Any]]) -> WorkerPool:
    from rollout.actor import RayWorker

    cluster = config.cluster
    build = functools.partial(build_engine, _for_process(config, cluster.rollout_workers))

    def start(number: int) -> Worker:
        return RayWorker(f"rollout worker {number}", build, on_push=config.rollout.on_push, options=options[number])

    settings = PoolSettings(
        # beside what its engine samples at a time, a worker has as much waiting, so that no row stays empty
        capacity=2 * config.rollout.max_completions,
        silence_s=cluster.silence_timeout_s,
        stall_s=cluster.stall_timeout_s,
        start_s=cluster.start_timeout_s,
        push_s=cluster.push_timeout_s,
        max_failures=cluster.max_worker_failures,
    )
    return WorkerPool(start, cluster.rollout_workers, settings)


def _start_learner(
    config: RunConfig, checkpoint: Path | None, on_bad_step: Report, options: Sequence[dict[str, Any]]
) -> RayLearner:
    from learner.actor import RayLearner

    rank_config = _for_process(config, config.cluster.learner_ranks)
    return RayLearner(
        functools.partial(build_learner, rank_config, checkpoint=checkpoint and checkpoint.absolute()),
        on_bad_step=on_bad_step,
        step_s=config.cluster.learner_timeout_s,
        device="cuda" if _on_gpus(config) else "cpu",
        options=options,
    )


def _place(config: RunConfig, resources: ExitStack) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reserve what the actors need, all or nothing, and give the options of each learner rank and rollout worker.

    Raises:
        ClusterError: when the cluster does not have it within `cluster.start_timeout_s`.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    cluster, cuda = config.cluster, _on_gpus(config)
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


def _on_gpus(config: RunConfig) -> bool:
    """Whether the actors use GPUs; this process, on a cluster, may have none itself."""
    import ray

    if config.model.device == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.model.device != "cpu"


def _for_process(config: RunConfig, processes: int) -> RunConfig:
    """The configuration as one of several processes, perhaps in another folder, needs it."""
    threads = config.cluster.threads or max(1, (os.cpu_count() or 1) // processes)
    path = config.model.path
    if not path.startswith(EMBEDDED) and Path(path).is_dir():
        path = str(Path(path).absolute())
    # Ray shows each process its own GPUs only, so their numbers begin at 0 in each
    device = "cuda" if config.model.device.startswith("cuda") else config.model.device
    return dataclasses.replace(
        config,
        cluster=dataclasses.replace(config.cluster, threads=threads),
        model=dataclasses.replace(config.model, path=path, device=device),
    )


def _check_listens(address: str) -> None:
    """Fail at once where nothing listens at HOST:PORT; Ray would try for a quarter of an hour."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "://" not in address:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(str(error)) from error


def _start_ray(config: RunConfig) -> Callable[[], None]:
    """Join the Ray cluster that `cluster.address` or the environment names, or start one here.

    Returns:
        What ends it again; a cluster that was there before goes on.
    """
    import ray

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
        return ray.shutdown
    return _start_own_ray(options)


def _start_own_ray(options: dict[str, Any]) -> Callable[[], None]:
    """A Ray of this run alone, in a temporary folder that is gone with it.

    The folder's lock is held for as long as this process lives, so that those of killed runs are told from those in use.
    """
    import fcntl

    import ray

    # Ray's sockets are in there, and a socket's path may have a hundred characters only
    root = Path(tempfile.gettempdir())
    root = root if len(str(root)) <= LONGEST_ROOT else Path("/tmp")
    for leftover in root.glob(f"{RAY_FOLDER}*"):
        with suppress(OSError), (leftover / LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix=RAY_FOLDER, dir=root))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        lock = stack.enter_context((folder / LOCK_FILE).open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        ray.init(address="local", include_dashboard=False, _temp_dir=str(folder), **options)
        stack.callback(ray.shutdown)
        return stack.pop_all().close
