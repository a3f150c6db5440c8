"""Build pool and learner: `cluster=local` here with shared parameters, `cluster=ray` in actors."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from learner.distributed import Parallelism
from learner.learner import OnSkippedUpdate, PolicyLearner
from rlmed.cluster.capacity import (
    check_memory,
    engine_estimate,
    engines_sleep,
    free_memory,
    model_size,
    place,
    settle_local,
    settle_machines,
    settle_rank,
    vllm_settings,
)
from rlmed.cluster.engines import (
    build_local_pool,
    build_policies,
    build_policy,
    engine_limits,
    make_renderer,
    settle_model,
    shares_gpus,
)
from rlmed.cluster.memory import engines_that_pack
from rlmed.cluster.replay import NoLearner, ReplayPool
from rlmed.cluster.requirements import NO_RAY
from rlmed.core.config.checks import require
from rlmed.core.config.schema import ModelConfig, RunConfig
from rlmed.core.process.threads import usable_cores
from rlmed.core.protocols import Learner, RolloutPool
from rlmed.data.prompts import PromptRenderer
from rlmed.models.folder.adapter import is_adapter
from rlmed.models.loading import model_folder, resolve_device
from rlmed.models.policy import Policy
from rlmed.models.tiny.toy import EMBEDDED
from rollout.engine import Engine
from rollout.fake import FakeEngine
from rollout.native.engine import NativeEngine
from rollout.pool.pool import WorkerPool
from rollout.pool.state import PoolSettings
from rollout.pool.worker import Worker

if TYPE_CHECKING:
    from learner.actor import LocalLearner, RayLearner

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cluster:
    """The two parts that the loop drives."""

    pool: RolloutPool
    learner: Learner
    evaluation_pool: RolloutPool
    """Pool on the same weights, which leaves training requests in flight alone."""
    model: ModelConfig
    """Model settings as decided for all processes."""
    resources: ExitStack
    """Resources that `close` releases, newest first."""

    def close(self) -> None:
        """Release all resources of the run, even if one fails; idempotent."""
        self.resources.close()


def build_cluster(
    config: RunConfig, renderer: PromptRenderer, folder: Path, *, checkpoint: Path | None, on_bad_step: OnSkippedUpdate
) -> Cluster:
    """Build pool and learner as set by `config.cluster`.

    Args:
        config: the run.
        renderer: its tokenizer decodes sampled ids.
        folder: the run's folder.
        checkpoint: load the policy from here instead of `config.model`; the reference is always
            `config.model`.
        on_bad_step: called with skipped batches.

    Raises:
        ValueError: if Ray is requested but not installed.
        ConnectionError: if no Ray cluster answers at `config.cluster.address`.
    """
    resumed = folder if checkpoint else None
    if checkpoint is None:  # resume=auto may have found nothing
        config = dataclasses.replace(config, resume=None)
    if config.cluster.kind == "ray":
        for line in idle_processes(config):
            log.warning("%s", line)
        return build_ray(config, resumed, checkpoint, on_bad_step)
    engines = engines_that_pack(config.cluster, max_staleness=config.algo.max_staleness)
    config = dataclasses.replace(config, model=settle_model(config.model, engines=engines, resumed=resumed))
    config = settle_local(config, engines=engines, learns=config.debug.learn)
    if config.debug.learn:
        trained, policy = load_policies(config, checkpoint, samples=True)
        learner: Learner = build_learner(config, on_bad_step, policy=trained)
    else:
        policy = build_policy(config.model, model_folder(config.model.path), threads=config.cluster.threads)
        learner = NoLearner()
    evaluation_pool: RolloutPool = build_local_pool(config.rollout, policy, renderer)
    pool = evaluation_pool  # with the same memory: on-policy, nothing is in flight during an evaluation
    if config.debug.recorded:
        pool = ReplayPool(Path(config.debug.recorded), evaluation_pool)
    elif config.algo.max_staleness:
        pool = build_local_pool(config.rollout, policy, renderer)
    return _cluster(config.model, ExitStack(), pool, learner, evaluation_pool)


def _cluster(
    model: ModelConfig, resources: ExitStack, pool: RolloutPool, learner: Learner, evaluation_pool: RolloutPool
) -> Cluster:
    for each in (pool, evaluation_pool):
        resources.callback(each.close)
    return Cluster(pool, learner, evaluation_pool, model, resources)


def build_learner(
    config: RunConfig,
    on_bad_step: OnSkippedUpdate,
    parallelism: Parallelism | None = None,
    *,
    policy: Policy | None = None,
    checkpoint: Path | None = None,
) -> PolicyLearner:
    """Build the learner here, on `policy` or `checkpoint`'s; the reference is `config.model`.

    `parallelism` is that of the learner ranks that it belongs to; None for a single process.
    """
    if policy is None:
        config = settle_rank(config, parallelism)
    policy = policy or load_policies(config, checkpoint, samples=False)[0]
    reference = None
    if config.algo.loss.kl_coef > 0 and policy.adapters is None:
        reference = build_policy(config.model, model_folder(config.model.path), threads=config.cluster.threads)
        reference.model.requires_grad_(False)
    return PolicyLearner(
        policy,
        reference,
        config.algo.loss,
        config.learner,
        total_steps=config.steps,
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        on_bad_step=on_bad_step,
        parallelism=parallelism,
    )


def load_policies(config: RunConfig, checkpoint: Path | None, *, samples: bool) -> tuple[Policy, Policy]:
    """Load the policy to train and the one to sample from, see `build_policies`."""
    return build_policies(
        config.model,
        config.learner.lora,
        checkpoint=checkpoint,
        seed=config.seed,
        threads=config.cluster.threads,
        samples=samples,
    )


def build_engine(config: RunConfig) -> Engine:
    """Build a rollout worker's engine with its own model: the run's base until a weight push."""
    if config.rollout.engine == "vllm":
        return _build_vllm(config)
    renderer = make_renderer(config.model, config.data, config.prompt)
    if config.rollout.engine == "fake":
        return FakeEngine(renderer.completion_ids)
    device = resolve_device(config.model)
    if device.type == "cuda" and not shares_gpus(config.cluster):  # else the learner has counted it, see `settle_rank`
        estimate = engine_estimate(model_size(config))
        check_memory(config, estimate, where=place(device), available=free_memory(device))
    policy = build_policy(config.model, model_folder(config.model.path), threads=config.cluster.threads)
    policy.model.requires_grad_(False)
    return NativeEngine(policy, renderer.decode, engine_limits(config.rollout, config.data.max_prompt_tokens))


def _build_vllm(config: RunConfig) -> Engine:
    if config.cluster.threads:  # vLLM reads the thread counts of torch and OpenMP on import
        torch.set_num_threads(config.cluster.threads)
        os.environ["OMP_NUM_THREADS"] = str(config.cluster.threads)
    folder = model_folder(config.model.path)
    require(
        not is_adapter(folder),
        f"rollout=vllm loads full models, and {folder} is an adapter: use rollout=native, or merge it first (peft's "
        "merge_and_unload()) and give the merged folder",
    )
    from rollout.vllm_backend.engine import VllmEngine

    settings = vllm_settings(config, on_cpu=resolve_device(config.model).type == "cpu")
    return VllmEngine(folder, settings)


def build_ray(
    config: RunConfig,
    resumed: Path | None,
    checkpoint: Path | None,
    on_bad_step: OnSkippedUpdate,
    build: Callable[..., LocalLearner] = build_learner,
    *,
    written: int | None = None,
) -> Cluster:
    """Build pool and learner in Ray actors; `resumed` is the run's folder if a run goes on in it.

    Other arguments as in `build_cluster`; `build` builds one rank's learner. `written`: see
    `rlmed.cluster.capacity.local_estimate`.
    """
    try:
        from rlmed.cluster.ray_session import machines_of, on_gpus, place_actors, start_ray
    except ImportError as error:
        raise ValueError(NO_RAY) from error
    on_cpus = config
    if not config.model.device.startswith("cuda"):  # before Ray's own processes disturb the probes
        engines = engines_that_pack(config.cluster, max_staleness=config.algo.max_staleness)
        model = dataclasses.replace(config.model, device="cpu")
        on_cpus = dataclasses.replace(config, model=settle_model(model, engines=engines, resumed=resumed))
    with ExitStack() as resources:  # released on failure, else handed to the cluster
        resources.callback(start_ray(config.cluster))
        cuda = on_gpus(config.model.device)
        config = config if cuda else on_cpus
        rank_options, worker_options = place_actors(
            config.cluster,
            resources,
            cuda=cuda,
            gpus_per_engine=config.rollout.tensor_parallel_size,
            learns=config.debug.learn,
        )
        if not cuda:
            config = settle_machines(config, machines_of(rank_options, worker_options), written=written)

        def start_learner() -> Learner:
            if not config.debug.learn:
                return NoLearner()
            learner = _start_learner(config, checkpoint, on_bad_step, rank_options, build)
            resources.callback(learner.close)
            return learner

        # on a shared GPU, start one after the other: a starting vLLM engine mistakes others'
        # allocations for its own
        shared = shares_gpus(config.cluster)
        learner = start_learner() if shared else None
        workers = _start_workers(config, worker_options)
        resources.callback(workers.close)
        if shared:
            workers.wait_until_ready()
        pool: RolloutPool = workers.channel()
        if config.debug.recorded:
            pool = ReplayPool(Path(config.debug.recorded), pool)
        learner = learner or start_learner()
        return _cluster(config.model, resources.pop_all(), pool, learner, workers.channel())


def idle_processes(config: RunConfig) -> list[str]:
    """Warn of rollout workers or learner ranks that a step cannot use, and say what to set.

    A group is sampled by one worker; ranks share a step's completions.
    """
    algo, cluster = config.algo, config.cluster
    groups, said = algo.groups_per_step * (1 + algo.max_staleness), []
    if (idle := cluster.rollout_workers - groups) > 0:
        said.append(
            f"cluster.rollout_workers={cluster.rollout_workers} exceeds the {groups} groups sampled at a time "
            f"(algo.groups_per_step={algo.groups_per_step}, algo.max_staleness={algo.max_staleness}), so {idle} will be "
            f"idle in training: set cluster.rollout_workers={groups} or less, or algo.groups_per_step="
            f"{math.ceil(cluster.rollout_workers / (1 + algo.max_staleness))}"
        )
    completions = algo.groups_per_step * algo.group_size // config.learner.mini_batches
    if config.debug.learn and (idle := cluster.learner_ranks - completions) > 0:
        said.append(
            f"cluster.learner_ranks={cluster.learner_ranks} exceeds the {completions} completions of an update "
            f"(algo.groups_per_step={algo.groups_per_step}, algo.group_size={algo.group_size}, "
            f"learner.mini_batches={config.learner.mini_batches}), so {idle} will be idle: set "
            f"cluster.learner_ranks={completions} or less"
        )
    return said


def _start_workers(config: RunConfig, options: Sequence[dict[str, Any]]) -> WorkerPool:
    from rlmed.cluster.ray_session import on_gpus
    from rollout.pool.actor import RayWorker

    cluster, cuda = config.cluster, on_gpus(config.model.device)
    sleeps = engines_sleep(config, cuda=cuda)
    share = config.rollout.gpu_memory_utilization
    require(
        cuda or share is None,
        f"rollout.gpu_memory_utilization={share} needs a GPU, and none was found: set rollout.kv_cache_gib",
    )
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, sleep=sleeps))
    build = functools.partial(build_engine, _for_process(config, cluster.rollout_workers))

    def start(number: int) -> Worker:
        return RayWorker(f"rollout worker {number}", build, on_push=config.rollout.on_push, options=options[number])

    settings = PoolSettings(
        # queue as much again as the engine samples at a time, so that no row stays empty
        capacity=2 * config.rollout.max_completions,
        silence_s=cluster.silence_timeout_s,
        stall_s=cluster.stall_timeout_s,
        start_s=cluster.start_timeout_s,
        push_s=cluster.push_timeout_s,
        sleeps=sleeps,
        max_failures=cluster.max_worker_failures,
    )
    return WorkerPool(start, cluster.rollout_workers, settings)


def _start_learner(
    config: RunConfig,
    checkpoint: Path | None,
    on_bad_step: OnSkippedUpdate,
    options: Sequence[dict[str, Any]],
    build: Callable[..., LocalLearner],
) -> RayLearner:
    from learner.actor import RayLearner
    from rlmed.cluster.ray_session import on_gpus

    cluster, cuda = config.cluster, on_gpus(config.model.device)
    rank_config = _for_process(config, cluster.learner_ranks)
    require(
        cuda or cluster.weight_transfer in ("auto", "object_store"),
        f"cluster.weight_transfer={cluster.weight_transfer} needs GPUs, and none were found: use auto",
    )
    direct = cuda and config.rollout.engine != "fake"
    return RayLearner(
        functools.partial(build, rank_config, checkpoint=checkpoint and checkpoint.absolute()),
        on_bad_step=on_bad_step,
        step_s=cluster.learner_timeout_s,
        device="cuda" if cuda else "cpu",
        options=options,
        weight_transfer=cluster.weight_transfer if direct else "object_store",
        push_s=cluster.push_timeout_s,
        shares_gpu=shares_gpus(config.cluster),
    )


def _for_process(config: RunConfig, processes: int) -> RunConfig:
    """Adapt the configuration to one of several processes, whose working folder may differ."""
    threads = config.cluster.threads or max(1, usable_cores() // processes)
    path = config.model.path
    if not path.startswith(EMBEDDED) and Path(path).is_dir():
        path = str(Path(path).absolute())
    return dataclasses.replace(
        config,
        cluster=dataclasses.replace(config.cluster, threads=threads),
        model=dataclasses.replace(config.model, path=path),
    )
