"""Compare a run's memory with the device's before loading anything; say what would fit."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from learner.distributed import Parallelism, SingleProcess
from rlmed.cluster.advice import advise
from rlmed.cluster.engines import memory_share, shares_gpus
from rlmed.cluster.memory import (
    GIB,
    PROCESS_BYTES,
    Batch,
    MemoryEstimate,
    Sampling,
    added,
    engine_memory,
    learner_memory,
    merged_weights,
    packed_weights,
    together,
)
from rlmed.core.config.checks import require
from rlmed.core.config.schema import ModelConfig, RunConfig
from rlmed.core.process.threads import available_memory
from rlmed.data.images import kept_bytes
from rlmed.models.loading import model_folder, resolve_device, resolve_dtype
from rlmed.models.policy import DTYPES, load_config
from rlmed.models.size import ModelSize, meta_model

if TYPE_CHECKING:
    from rollout.vllm_backend.settings import VllmSettings

log = logging.getLogger(__name__)

MARGIN = 1.1
"""Excess over what is available, as a factor, from which a run is refused: estimates are as far
off.
"""
Estimate = Callable[[RunConfig], MemoryEstimate]
"""Estimates the memory of a process under changed settings."""


def place(device: torch.device) -> str:
    """Return the device in words."""
    return "this machine" if device.type == "cpu" else f"GPU {device}"


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on the device; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


@dataclass(frozen=True, slots=True)
class Machine:
    """CPUs of a machine that several actors share."""

    where: str
    """Its name in messages."""
    ranks: int
    """Learner ranks there."""
    workers: int
    """Rollout workers there."""
    available: int | None
    """Bytes that they can take; None if unknown."""


def model_size(config: RunConfig) -> ModelSize:
    """Return the sizes of the run's model, which is not loaded."""
    return ModelSize.of(meta_model(load_config(model_folder(config.model.path))))


def sampled_batch(config: RunConfig, size: ModelSize) -> Batch:
    """Return the batch of one learner rank, its prompts and completions of the greatest lengths."""
    share = config.cluster.learner_ranks * config.learner.mini_batches
    return _batch(config, size, config.algo.groups_per_step / share, config.algo.group_size, config.rollout.max_tokens)


def written_batch(config: RunConfig, size: ModelSize, max_tokens: int) -> Batch:
    """Return the same for supervised fine-tuning, with written completions of `max_tokens`."""
    return _batch(config, size, config.sft.batch_size / config.cluster.learner_ranks, 1, max_tokens)


def _batch(config: RunConfig, size: ModelSize, groups: float, group_size: int, max_tokens: int) -> Batch:
    return Batch(
        groups=math.ceil(groups),
        group_size=group_size,
        prompt_tokens=config.data.max_prompt_tokens,
        visual_tokens=most_visual_tokens(
            size, config.model, config.data.max_prompt_tokens, images=config.data.max_images or 1
        ),
        max_tokens=max_tokens,
        token_budget=config.learner.token_budget,
    )


def most_visual_tokens(size: ModelSize, model: ModelConfig, prompt_tokens: int, *, images: int) -> int:
    """Return the largest number of visual tokens in a prompt of `prompt_tokens` and `images`."""
    if size.vision is None:
        return 0
    pixels = size.patches_per_token * size.patch_pixels
    return min(prompt_tokens, images * math.ceil((model.max_pixels or prompt_tokens * pixels) / pixels))


def most_sampled(config: RunConfig, *, training: bool) -> Sampling:
    """Return the most that an engine samples: evaluations, and in `training` also groups."""
    rollout, prompt_tokens = config.rollout, config.data.max_prompt_tokens
    rows, prefill = rollout.max_completions, max(rollout.prefill_tokens, prompt_tokens)
    tokens = rows * (config.eval.max_tokens + prompt_tokens)  # each completion has its own prompt
    if not training:
        return Sampling(rows, tokens, prefill, filtered=False)
    groups = rows * rollout.max_tokens + max(1, rows // config.algo.group_size) * prompt_tokens
    # on-policy, nothing is in flight during evaluation
    tokens = tokens + groups if config.algo.max_staleness else max(tokens, groups)
    return Sampling(rows, tokens, prefill, filtered=rollout.top_p < 1 or rollout.top_k > 0)


def local_estimate(
    size: ModelSize, *, engines: int, pictures: int, on_cpu: bool, written: int | None = None
) -> Estimate:
    """Return the estimate of a process that learns and samples.

    Args:
        size: of the model.
        engines: those that may hold packed weights.
        pictures: bytes of decoded images.
        on_cpu: where it computes.
        written: tokens of the longest written completion that it learns from, where sampling is for
            evaluations alone; None where it learns from what it samples.
    """
    rank = rank_estimate(size, on_cpu=on_cpu, written=written)
    engine = engine_estimate(size, engines=engines, sampled=written is None)

    def estimate(config: RunConfig) -> MemoryEstimate:
        merged = merged_weights(size, config.learner, dtype=resolve_dtype(config.model))
        return dataclasses.replace(together(rank(config), engine(config), pictures), merged=merged)

    return estimate


def engine_estimate(size: ModelSize, *, engines: int = 1, pictures: int = 0, sampled: bool = True) -> Estimate:
    """Return the estimate of a process that only samples."""
    load = functools.cache(lambda path: load_config(model_folder(path)))

    def estimate(config: RunConfig) -> MemoryEstimate:
        model, dtype = load(config.model.path), resolve_dtype(config.model)
        weights = DTYPES[dtype].itemsize * size.parameters
        if config.rollout.engine == "fake":
            return MemoryEstimate(weights=weights, pictures=pictures)
        if config.rollout.engine == "vllm":  # on a CPU: of a GPU it takes a share, see `settle_rank`
            cache = vllm_settings(config, on_cpu=True).kv_cache_bytes(model, on_cpu=True)
            assert cache is not None
            return MemoryEstimate(weights=weights, kv_cache=cache, pictures=pictures)
        packed = packed_weights(model, config.model, dtype=dtype, engines=engines)
        engine = engine_memory(size, most_sampled(config, training=sampled), dtype=dtype, packed=packed)
        return dataclasses.replace(engine, weights=weights, pictures=pictures)

    return estimate


def vllm_settings(config: RunConfig, *, on_cpu: bool) -> VllmSettings:
    """Return sizes and precision of a vLLM engine."""
    from rollout.vllm_backend.settings import VllmSettings

    rollout = config.rollout
    return VllmSettings(
        dtype=resolve_dtype(config.model),
        max_completions=rollout.max_completions,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_images=config.data.max_images or 1,
        max_tokens=max(rollout.max_tokens, config.eval.max_tokens),
        gpu_memory_utilization=memory_share(rollout, config.cluster),
        tensor_parallel_size=rollout.tensor_parallel_size,
        kv_cache_gib=rollout.kv_cache_gib,
        enforce_eager=on_cpu if rollout.enforce_eager is None else rollout.enforce_eager,
        sleep=bool(rollout.sleep),
        seed=config.seed,
    )


def rank_estimate(
    size: ModelSize, *, on_cpu: bool, beside: Callable[[RunConfig], int] = lambda _: 0, written: int | None = None
) -> Estimate:
    """Return the estimate of a learner rank; an engine `beside` takes so many bytes of its GPU.

    `written`: see `local_estimate`.
    """

    def estimate(config: RunConfig) -> MemoryEstimate:
        memory = learner_memory(
            size,
            config.learner,
            sampled_batch(config, size) if written is None else written_batch(config, size, written),
            dtype=resolve_dtype(config.model),
            on_cpu=on_cpu,
            reference=written is None and config.algo.loss.kl_coef > 0,
            checkpointing=bool(config.learner.gradient_checkpointing),
            ranks=config.cluster.learner_ranks,
        )
        return dataclasses.replace(memory, engine=beside(config))

    return estimate


def machine_estimate(size: ModelSize, machine: Machine, *, ranks: int, written: int | None = None) -> Estimate:
    """Return the estimate of all actors on a machine, which has its share of the run's `ranks`."""
    rank = rank_estimate(size, on_cpu=True, written=written)
    engine = engine_estimate(size, sampled=written is None)

    def estimate(config: RunConfig) -> MemoryEstimate:
        own = math.ceil(machine.ranks * config.cluster.learner_ranks / ranks)
        return added([rank(config)] * own + [engine(config)] * machine.workers)

    return estimate


def settle_memory(
    config: RunConfig, estimate: Estimate, where: str, available: int | None, *, processes: int = 1
) -> RunConfig:
    """Decide `learner.gradient_checkpointing`, and refuse a run that would not fit.

    Arguments and error as of `check_memory`.
    """
    if config.learner.gradient_checkpointing is None:
        without, recomputed = (
            dataclasses.replace(config, learner=dataclasses.replace(config.learner, gradient_checkpointing=value))
            for value in (False, True)
        )
        need = estimate(without).peak + processes * PROCESS_BYTES
        config = without
        if available is not None and need > available:
            config = recomputed
            log.info(
                "learner.gradient_checkpointing: on, since %.1f GiB would be needed without and %s has %.1f",
                need / GIB,
                where,
                available / GIB,
            )
    check_memory(config, estimate, where=where, available=available, processes=processes)
    return config


def check_memory(
    config: RunConfig, estimate: Estimate, where: str, available: int | None, *, processes: int = 1
) -> None:
    """Log what a run needs, and refuse it if it would not fit; warn where that is not certain.

    Args:
        config: the run.
        estimate: of all its processes that share the memory.
        where: the device in words.
        available: bytes that it has left; None if unknown, which refuses nothing.
        processes: their number.

    Raises:
        ValueError: with what is needed, what there is, and the settings that would fit.
    """

    def needed(changed: RunConfig) -> int:
        return estimate(changed).peak + processes * PROCESS_BYTES

    found = estimate(config)
    log.info("%s", found.line())
    if available is None or needed(config) <= available:
        return
    parts = sorted(found.parts().items(), key=lambda part: -part[1])[:4]
    terms = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size)
    said = (
        f"this run needs up to {needed(config) / GIB:.1f} GiB of memory and {where} has {available / GIB:.1f} ({terms})"
    )
    advice = advise(config, needed, available)
    if config.cluster.check_memory and needed(config) > MARGIN * available:
        raise ValueError(f"{said}: {advice} (cluster.check_memory=false starts it nevertheless)")
    log.warning("%s; if it ends for lack of memory, %s", said, advice)


def settle_local(config: RunConfig, *, engines: int, learns: bool, written: int | None = None) -> RunConfig:
    """Settle the memory of a run in this process, see `settle_memory`.

    Args:
        config: the run.
        engines: those that may hold packed weights.
        learns: whether it learns, or only samples.
        written: see `local_estimate`; 0 for a process that only evaluates.
    """
    device, size = resolve_device(config.model), model_size(config)
    where, available = place(device), free_memory(device)
    pictures = kept_bytes() if device.type == "cpu" else 0  # they stay in the host's memory
    if not learns:
        engine = engine_estimate(size, engines=engines, pictures=pictures, sampled=written is None)
        check_memory(config, engine, where=where, available=available)
        return config
    both = local_estimate(size, engines=engines, pictures=pictures, on_cpu=device.type == "cpu", written=written)
    return settle_memory(config, both, where=where, available=available)


def settle_rank(config: RunConfig, parallelism: Parallelism | None, *, written: int | None = None) -> RunConfig:
    """Settle the memory of this learner rank beside an engine on its GPU, see `settle_memory`.

    Nothing is left to settle for a Ray actor on a CPU, see `settle_machines`.
    """
    device, size = resolve_device(config.model), model_size(config)
    on_cpu = device.type == "cpu"
    if on_cpu and config.cluster.kind == "ray":
        return config

    def beside(changed: RunConfig) -> int:
        if on_cpu or not shares_gpus(changed.cluster) or engines_sleep(changed, cuda=True):
            return 0
        if changed.rollout.engine == "vllm":
            return int(memory_share(changed.rollout, changed.cluster) * torch.cuda.mem_get_info(device)[1])
        return engine_estimate(size, sampled=written is None)(changed).peak

    settled = settle_memory(
        config,
        rank_estimate(size, on_cpu=on_cpu, beside=beside, written=written),
        where=place(device),
        available=free_memory(device),
    )
    # ranks gather weights together, again where activations are recomputed: one decision for all
    own = float(bool(settled.learner.gradient_checkpointing))
    recomputed = (parallelism or SingleProcess()).merge(own, {})[0] > 0
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, gradient_checkpointing=recomputed))


def settle_machines(config: RunConfig, machines: Sequence[Machine], *, written: int | None = None) -> RunConfig:
    """Settle the memory of all actors on CPUs, before any of them starts, see `settle_memory`."""
    size, recomputed = model_size(config), False
    for machine in machines:
        estimate = machine_estimate(size, machine, ranks=config.cluster.learner_ranks, written=written)
        there, processes = (machine.where, machine.available), machine.ranks + machine.workers
        if machine.ranks:
            settled = settle_memory(config, estimate, *there, processes=processes)
            recomputed |= bool(settled.learner.gradient_checkpointing)
        else:
            check_memory(config, estimate, *there, processes=processes)
    # one decision for all ranks, see `settle_rank`
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, gradient_checkpointing=recomputed))


def engines_sleep(config: RunConfig, *, cuda: bool) -> bool:
    """Return whether engines free GPU memory during learning: as set, else if on the learner's GPU.

    Always False without a learner (debug.learn=false): only new weights wake them.

    Raises:
        ConfigError: if it is set without GPUs.
    """
    sleep = config.rollout.sleep
    require(cuda or not sleep, "rollout.sleep=true needs a GPU to release memory on: use rollout.sleep=null")
    if not config.debug.learn:
        return False
    if sleep is not None:
        return sleep
    return cuda and shares_gpus(config.cluster) and config.rollout.engine == "vllm" and config.algo.max_staleness == 0
