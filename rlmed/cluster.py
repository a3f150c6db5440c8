"""Where the parts run: `cluster=local` in this process on the same parameters, `cluster=ray` in actors."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.distributed import Ranks
from learner.learner import PolicyLearner, Report
from rlmed.core.config import ModelConfig, RunConfig
from rlmed.core.config_checks import require
from rlmed.core.protocols import Learner, RolloutPool
from rlmed.core.threads import usable_cores
from rlmed.core.toy import EMBEDDED
from rlmed.data.prompts import PromptRenderer
from rlmed.debug import NoLearner, RecordedPool
from rlmed.engines import build_engine, build_local_pool, build_policy, build_sender, settle_model, shares_gpus
from rlmed.memory import estimate
from rlmed.models.policy import Policy
from rlmed.setup import model_folder
from rollout.leases import PoolSettings
from rollout.pool import WorkerPool
from rollout.worker import Worker

if TYPE_CHECKING:
    from learner.actor import RayLearner

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cluster:
    """The two parts that the loop drives."""

    pool: RolloutPool
    learner: Learner
    evaluation_pool: RolloutPool
    """Samples from the same weights; training requests in flight are not disturbed by it."""
    model: ModelConfig
    """As it was settled for all processes."""
    resources: ExitStack
    """What is given back by `close`, the newest first."""

    def close(self) -> None:
        """Release all that was made for the run, whatever fails meanwhile; a second call does nothing."""
        self.resources.close()


def build_cluster(
    config: RunConfig, renderer: PromptRenderer, folder: Path, *, checkpoint: Path | None, on_bad_step: Report
) -> Cluster:
    """Pool and learner as `config.cluster` says.

    Args:
        config: the run.
        renderer: its tokenizer turns sampled ids into text.
        folder: of the run.
        checkpoint: load the policy from there instead of `config.model`; the reference is always `config.model`.
        on_bad_step: told of batches that were skipped.

    Raises:
        ValueError: when Ray is asked for and not installed.
        ConnectionError: when there is no Ray cluster at `config.cluster.address`.
    """
    resumed = folder if checkpoint else None
    if config.cluster.kind == "ray":
        return _build_ray(config, resumed, checkpoint, on_bad_step)
    config = settle_model(config, resumed)
    policy = build_policy(config, checkpoint or model_folder(config.model.path))
    learner = build_learner(config, on_bad_step, policy=policy) if config.debug.learn else NoLearner()
    log.info("%s", estimate(policy, config).line())
    pool: RolloutPool = build_local_pool(config, policy, renderer)
    if config.debug.recorded:
        pool = RecordedPool(Path(config.debug.recorded), pool)
    return _cluster(config, ExitStack(), pool, learner, build_local_pool(config, policy, renderer))


def _cluster(
    config: RunConfig, resources: ExitStack, pool: RolloutPool, learner: Learner, evaluation_pool: RolloutPool
) -> Cluster:
    for each in (pool, evaluation_pool):
        resources.callback(each.close)
    return Cluster(pool, learner, evaluation_pool, config.model, resources)


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


def _build_ray(config: RunConfig, resumed: Path | None, checkpoint: Path | None, on_bad_step: Report) -> Cluster:
    try:
        from rlmed.ray_session import on_gpus, place_actors, start_ray
    except ImportError as error:
        raise ValueError(
            "cluster=ray needs Ray: pip install -c requirements.lock -e '.[ray]' in rlmed's checkout"
        ) from error
    on_cpus = config
    if not config.model.device.startswith("cuda"):  # before Ray's own processes disturb the probes
        model = dataclasses.replace(config.model, device="cpu")
        on_cpus = settle_model(dataclasses.replace(config, model=model), resumed)
    with ExitStack() as resources:  # given back when anything fails, else handed on
        resources.callback(start_ray(config))
        config = config if on_gpus(config) else on_cpus
        rank_options, worker_options = place_actors(config, resources)

        def start_learner() -> Learner:
            if not config.debug.learn:
                return NoLearner()
            learner = _start_learner(config, checkpoint, on_bad_step, rank_options)
            resources.callback(learner.close)
            return learner

        # where both use one GPU, one after the other: a vLLM engine that starts takes what others allocate for its own
        shared = shares_gpus(config)
        learner = start_learner() if shared else None
        workers = _start_workers(config, worker_options)
        resources.callback(workers.close)
        if shared:
            workers.wait_until_ready()
        pool: RolloutPool = workers.channel()
        if config.debug.recorded:
            pool = RecordedPool(Path(config.debug.recorded), pool)
        learner = learner or start_learner()
        return _cluster(config, resources.pop_all(), pool, learner, workers.channel())


def _start_workers(config: RunConfig, options: Sequence[dict[str, Any]]) -> WorkerPool:
    from rlmed.ray_session import on_gpus
    from rollout.actor import RayWorker

    cluster, cuda = config.cluster, on_gpus(config)
    sleeps = engines_sleep(config, cuda=cuda)
    share = config.rollout.gpu_memory_utilization
    require(
        cuda or share is None,
        f"rollout.gpu_memory_utilization={share} is a share of a GPU's memory, and there is no GPU: set rollout.kv_cache_gib",
    )
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, sleep=sleeps))
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
        sleeps=sleeps,
        max_failures=cluster.max_worker_failures,
    )
    return WorkerPool(start, cluster.rollout_workers, settings)


def engines_sleep(config: RunConfig, *, cuda: bool) -> bool:
    """Whether engines give their GPU's memory back while the learner learns: as asked, else where they share its GPU.

    Never without a learner (debug.learn=false): only its next weights wake them.

    Raises:
        ConfigError: when it is asked for without GPUs.
    """
    sleep = config.rollout.sleep
    require(cuda or not sleep, "rollout.sleep=true needs a GPU, whose memory is given back: use rollout.sleep=null")
    if not config.debug.learn:
        return False
    if sleep is not None:
        return sleep
    return cuda and shares_gpus(config) and config.rollout.engine == "vllm" and config.algo.max_staleness == 0


def _start_learner(
    config: RunConfig, checkpoint: Path | None, on_bad_step: Report, options: Sequence[dict[str, Any]]
) -> RayLearner:
    from learner.actor import RayLearner
    from rlmed.ray_session import on_gpus

    cluster, cuda = config.cluster, on_gpus(config)
    rank_config = _for_process(config, cluster.learner_ranks)
    require(
        cuda or cluster.weight_transfer in ("auto", "object_store"),
        f"cluster.weight_transfer={cluster.weight_transfer} needs GPUs, and there are none: use auto",
    )
    direct = cuda and config.rollout.engine == "vllm" and cluster.weight_transfer != "object_store"
    return RayLearner(
        functools.partial(build_learner, rank_config, checkpoint=checkpoint and checkpoint.absolute()),
        on_bad_step=on_bad_step,
        step_s=cluster.learner_timeout_s,
        device="cuda" if cuda else "cpu",
        options=options,
        weight_transfer=cluster.weight_transfer,
        # connecting and sending together stay within what the pool allows a push
        make_sender=functools.partial(build_sender, limit_s=cluster.push_timeout_s / 2) if direct else None,
        shares_gpu=shares_gpus(config),
    )


def _for_process(config: RunConfig, processes: int) -> RunConfig:
    """The configuration as one of several processes, perhaps in another folder, needs it."""
    threads = config.cluster.threads or max(1, usable_cores() // processes)
    path = config.model.path
    if not path.startswith(EMBEDDED) and Path(path).is_dir():
        path = str(Path(path).absolute())
    return dataclasses.replace(
        config,
        cluster=dataclasses.replace(config.cluster, threads=threads),
        model=dataclasses.replace(config.model, path=path),
    )
