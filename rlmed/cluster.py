"""Where the parts run: `cluster=local` in this process on the same parameters, `cluster=ray` in actors."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

log = logging.getLogger(__name__)

RAY_FOLDER = "rlmed-ray-"
"""Begins the name of the temporary folder of a Ray that was started for one run; the run's process id follows."""
Report = Callable[[Sequence[TrainGroup], str], None]
"""Told of a batch that was skipped, and why."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The two parts that the loop drives."""

    pool: RolloutPool
    learner: Learner
    evaluation_pool: RolloutPool
    """Samples from the same weights; training requests in flight are not disturbed by it."""
    release: tuple[Callable[[], None], ...] = field(default=())
    """Called in order when both pools are closed."""

    def close(self) -> None:
        """Release what they hold; a second call does nothing."""
        self.pool.close()
        self.evaluation_pool.close()
        for action in self.release:
            action()


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
    evaluation_pool = build_local_pool(config, policy, renderer)
    return Cluster(_recorded(config) or build_local_pool(config, policy, renderer), learner, evaluation_pool)


def _recorded(config: RunConfig) -> RolloutPool | None:
    """The recorded batches that the run shall learn from, if any."""
    return RecordedPool(Path(config.debug.recorded)) if config.debug.recorded else None


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
    from learner.actor import RayLearner
    from rollout.actor import RayWorker

    cluster = config.cluster
    stop_ray = _start_ray(config)
    try:
        rank_options, worker_options = _place(config)
        recorded = _recorded(config)
    except BaseException:
        stop_ray()
        raise
    worker_config, learner_config = (
        _for_process(config, count) for count in (cluster.rollout_workers, cluster.learner_ranks)
    )

    def start_worker(number: int) -> Worker:
        build = functools.partial(build_engine, worker_config)
        return RayWorker(
            f"rollout worker {number}", build, on_push=config.rollout.on_push, options=worker_options[number]
        )

    settings = PoolSettings(
        capacity=config.rollout.max_completions,
        silence_s=cluster.silence_timeout_s,
        stall_s=cluster.stall_timeout_s,
        start_s=cluster.start_timeout_s,
        push_s=cluster.push_timeout_s,
        max_failures=cluster.max_worker_failures,
    )
    workers = WorkerPool(start_worker, cluster.rollout_workers, settings)
    pool, evaluation_pool = recorded or workers.channel(), workers.channel()
    if not config.debug.learn:
        return Cluster(pool, NoLearner(), evaluation_pool, release=(stop_ray,))
    try:
        learner = RayLearner(
            functools.partial(build_learner, learner_config, checkpoint=checkpoint and checkpoint.absolute()),
            on_bad_step=on_bad_step,
            step_s=cluster.learner_timeout_s,
            device="cuda" if _on_gpus(config) else "cpu",
            options=rank_options,
        )
    except BaseException:
        workers.close()
        stop_ray()
        raise
    return Cluster(pool, learner, evaluation_pool, release=(learner.close, stop_ray))


def _place(config: RunConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reserve what the actors need, all or nothing, and give the options of each learner rank and rollout worker.

    Raises:
        ClusterError: when the cluster does not have it within `cluster.start_timeout_s`.
    """
    import ray
    from ray.util.placement_group import placement_group
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


def _remove_leftovers(root: Path) -> None:
    """Remove Ray's folders of runs of ours that were killed."""
    for folder in root.glob(f"{RAY_FOLDER}*-*"):
        process = folder.name.removeprefix(RAY_FOLDER).partition("-")[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


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
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise ConnectionError(
                f"no Ray cluster answers at cluster.address={address}: {error}. Start one (ray start --head), give this "
                "process its token (RAY_AUTH_TOKEN) where Ray speaks of authentication, or leave cluster.address=null to "
                "start Ray on this machine alone"
            ) from error
        return ray.shutdown
    # a folder of its own, so that nothing of this run is left in the machine's
    folder = tempfile.mkdtemp(prefix=f"{RAY_FOLDER}{os.getpid()}-")
    _remove_leftovers(Path(folder).parent)
    ray.init(address="local", include_dashboard=False, _temp_dir=folder, **options)

    def stop() -> None:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    return stop
