"""Compare a run's memory with the device's before loading anything; say what would fit."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from learner.distributed import Parallelism, SingleProcess
from learner.moments import has_eight_bits
from rlmed.cluster.engines import SLOW_BFLOAT16, memory_share, shares_gpus
from rlmed.cluster.memory import (
    GIB,
    PROCESS_BYTES,
    Batch,
    MemoryEstimate,
    Sampling,
    added,
    engine_memory,
    learner_memory,
    packed_weights,
    together,
)
from rlmed.core.config.checks import require
from rlmed.core.config.schema import ModelConfig, RunConfig
from rlmed.core.process.threads import available_memory
from rlmed.data.images import kept_bytes
from rlmed.models.cpu.products import bfloat16_speed
from rlmed.models.loading import model_folder, resolve_device, resolve_dtype
from rlmed.models.policy import DTYPES, load_config
from rlmed.models.size import ModelSize, meta_model

log = logging.getLogger(__name__)

MIN_BUDGET = 1024
"""Smallest `learner.token_budget` that is proposed."""
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


def model_size(config: RunConfig) -> ModelSize:
    """Return the sizes of the run's model, which is not loaded."""
    return ModelSize.of(meta_model(load_config(model_folder(config.model.path))))


def sampled_batch(config: RunConfig, size: ModelSize) -> Batch:
    """Return the batch of one learner rank, its prompts and completions of the greatest lengths."""
    share = config.cluster.learner_ranks * config.learner.mini_batches
    return _batch(config, size, config.algo.groups_per_step / share, config.algo.group_size, config.rollout.max_tokens)


def written_batch(config: RunConfig, size: ModelSize) -> Batch:
    """Return the same for supervised fine-tuning, with completions as long as in evaluation."""
    return _batch(config, size, config.sft.batch_size / config.cluster.learner_ranks, 1, config.eval.max_tokens)


def _batch(config: RunConfig, size: ModelSize, groups: float, group_size: int, max_tokens: int) -> Batch:
    return Batch(
        groups=math.ceil(groups),
        group_size=group_size,
        prompt_tokens=config.data.max_prompt_tokens,
        visual_tokens=most_visual_tokens(size, config.model, config.data.max_prompt_tokens),
        max_tokens=max_tokens,
        token_budget=config.learner.token_budget,
    )


def most_visual_tokens(size: ModelSize, model: ModelConfig, prompt_tokens: int) -> int:
    """Return the largest number of visual tokens in a prompt of `prompt_tokens`."""
    if size.vision is None:
        return 0
    pixels = size.patches_per_token * size.patch_pixels
    return min(prompt_tokens, math.ceil((model.max_pixels or prompt_tokens * pixels) / pixels))


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


def local_estimate(size: ModelSize, *, engines: int, pictures: int, on_cpu: bool, sampled: bool = True) -> Estimate:
    """Return the estimate of a process that learns and samples.

    Args:
        size: of the model.
        engines: those that may hold packed weights.
        pictures: bytes of decoded images.
        on_cpu: where it computes.
        sampled: whether it samples what it learns from, else it only evaluates.
    """
    rank, engine = (
        rank_estimate(size, on_cpu=on_cpu, sampled=sampled),
        engine_estimate(size, engines=engines, sampled=sampled),
    )
    return lambda config: together(rank(config), engine(config), pictures)


def engine_estimate(size: ModelSize, *, engines: int = 1, pictures: int = 0, sampled: bool = True) -> Estimate:
    """Return the estimate of a process that only samples."""

    def estimate(config: RunConfig) -> MemoryEstimate:
        model, dtype = load_config(model_folder(config.model.path)), resolve_dtype(config.model)
        weights = DTYPES[dtype].itemsize * size.parameters
        if config.rollout.engine == "fake":
            return MemoryEstimate(weights=weights, pictures=pictures)
        if config.rollout.engine == "vllm":
            return MemoryEstimate(
                weights=weights, kv_cache=int((config.rollout.kv_cache_gib or 0) * GIB), pictures=pictures
            )
        packed = packed_weights(model, config.model, dtype=dtype, engines=engines)
        engine = engine_memory(size, most_sampled(config, training=sampled), dtype=dtype, packed=packed)
        return dataclasses.replace(engine, weights=weights, pictures=pictures)

    return estimate


def rank_estimate(size: ModelSize, *, on_cpu: bool, engine_bytes: int = 0, sampled: bool = True) -> Estimate:
    """Return the estimate of a learner rank beside an engine that takes `engine_bytes` of its GPU.

    `sampled`: see `local_estimate`.
    """

    def estimate(config: RunConfig) -> MemoryEstimate:
        memory = learner_memory(
            size,
            config.learner,
            sampled_batch(config, size) if sampled else written_batch(config, size),
            dtype=resolve_dtype(config.model),
            on_cpu=on_cpu,
            reference=sampled and config.algo.loss.kl_coef > 0,
            checkpointing=bool(config.learner.gradient_checkpointing),
            ranks=config.cluster.learner_ranks,
        )
        return dataclasses.replace(memory, engine=engine_bytes)

    return estimate


def machine_estimate(size: ModelSize, *, learns: bool, sampled: bool) -> Estimate:
    """Return the estimate of all learner ranks and rollout workers on one machine's CPUs."""
    rank, engine = rank_estimate(size, on_cpu=True, sampled=sampled), engine_estimate(size, sampled=sampled)

    def estimate(config: RunConfig) -> MemoryEstimate:
        ranks, workers = config.cluster.learner_ranks if learns else 0, config.cluster.rollout_workers
        return added([rank(config)] * ranks + [engine(config)] * workers)

    return estimate


def settle_memory(
    config: RunConfig, estimate: Estimate, *, where: str, available: int | None, processes: int = 1
) -> RunConfig:
    """Decide `learner.gradient_checkpointing`, and refuse a run that would not fit.

    Arguments and error as of `check_memory`.
    """
    if config.learner.gradient_checkpointing is None:
        without, recomputed = (_learner(config, gradient_checkpointing=value) for value in (False, True))
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
    config: RunConfig, estimate: Estimate, *, where: str, available: int | None, processes: int = 1
) -> None:
    """Log what a run needs, and refuse it if it would not fit.

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
    raise ValueError(
        f"this run needs up to {needed(config) / GIB:.1f} GiB of memory and {where} has {available / GIB:.1f} "
        f"({terms}): {_advice(config, lambda changed: needed(changed) <= available, needed)}"
    )


def settle_local(config: RunConfig, *, engines: int, learns: bool, sampled: bool = True) -> RunConfig:
    """Settle the memory of a run in this process, see `settle_memory`.

    Args:
        config: the run.
        engines: those that may hold packed weights.
        learns: whether it learns, or only samples.
        sampled: whether it samples training completions, else it only evaluates.
    """
    device, size = resolve_device(config.model), model_size(config)
    where, available = place(device), free_memory(device)
    pictures = kept_bytes() if device.type == "cpu" else 0  # they stay in the host's memory
    if not learns:
        check_memory(
            config,
            engine_estimate(size, engines=engines, pictures=pictures, sampled=sampled),
            where=where,
            available=available,
        )
        return config
    both = local_estimate(size, engines=engines, pictures=pictures, on_cpu=device.type == "cpu", sampled=sampled)
    return settle_memory(config, both, where=where, available=available)


def settle_rank(config: RunConfig, parallelism: Parallelism | None, *, sampled: bool = True) -> RunConfig:
    """Settle the memory of this learner rank beside an engine on its device, see `settle_memory`.

    Nothing is left to settle on a CPU of a session of its own, see `build_ray`.
    """
    device, size = resolve_device(config.model), model_size(config)
    on_cpu, beside = device.type == "cpu", 0
    if on_cpu and config.cluster.kind == "ray" and config.cluster.address is None:
        return config
    if not on_cpu and shares_gpus(config.cluster) and not engines_sleep(config, cuda=True):
        if config.rollout.engine == "vllm":
            beside = int(memory_share(config.rollout, config.cluster) * torch.cuda.mem_get_info(device)[1])
        else:
            beside = engine_estimate(size, sampled=sampled)(config).peak
    settled = settle_memory(
        config,
        rank_estimate(size, on_cpu=on_cpu, engine_bytes=beside, sampled=sampled),
        where=place(device),
        available=free_memory(device),
    )
    # ranks gather weights together, again where activations are recomputed: one decision for all
    own = float(bool(settled.learner.gradient_checkpointing))
    recomputed = (parallelism or SingleProcess()).merge(own, {})[0] > 0
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, gradient_checkpointing=recomputed))


def settle_machine(config: RunConfig, *, sampled: bool) -> RunConfig:
    """Settle the memory of all actors on this machine's CPUs, before any of them starts."""
    learns, cpu = config.debug.learn, torch.device("cpu")
    processes = config.cluster.rollout_workers + (config.cluster.learner_ranks if learns else 0)
    estimate, available = machine_estimate(model_size(config), learns=learns, sampled=sampled), free_memory(cpu)
    if not learns:
        check_memory(config, estimate, where=place(cpu), available=available, processes=processes)
        return config
    return settle_memory(config, estimate, where=place(cpu), available=available, processes=processes)


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


def _learner(config: RunConfig, **changes: object) -> RunConfig:
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, **changes))  # type: ignore[arg-type]


def _advice(config: RunConfig, fits: Callable[[RunConfig], bool], needed: Callable[[RunConfig], int]) -> str:
    """Return the settings that would fit: alone, else as many together as it takes."""
    alone = [text for text, changed in _changes(config) if fits(changed)]
    if alone:
        return f"set {' or '.join(alone[:3])}"
    names = list(dict.fromkeys(text.partition("=")[0] for text, _ in _changes(config)))
    taken, changed = _together(config, names, needed)
    if not fits(changed):
        even = f"even {' '.join(taken)} would need {needed(changed) / GIB:.1f}: " if taken else ""
        return f"{even}use a smaller model or a device with more memory"
    for name in reversed(names):  # the most harmful first
        fewer = [other for other in names if other != name]
        if fits(_together(config, fewer, needed)[1]):
            names = fewer
    return f"set {' '.join(_together(config, names, needed)[0])}"


def _together(
    config: RunConfig, names: Sequence[str], needed: Callable[[RunConfig], int]
) -> tuple[list[str], RunConfig]:
    """Return the settings of these keys that take the least memory, and the run with them."""
    taken = []
    for name in names:
        options = [entry for entry in _changes(config) if entry[0].startswith(f"{name}=")]
        text, smaller = min(options, key=lambda entry: needed(entry[1]), default=("", config))
        if needed(smaller) < needed(config):
            config = smaller
            taken.append(text)
    return taken, config


def _changes(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield settings that take less memory, the least harmful first."""
    learner = config.learner
    if not learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing=true", _learner(config, gradient_checkpointing=True)
    budget = learner.token_budget // 2
    while budget >= MIN_BUDGET:
        yield f"learner.token_budget={budget}", _learner(config, token_budget=budget)
        budget //= 2
    rows = config.rollout.max_completions // 2
    while rows >= config.algo.group_size:
        rollout = dataclasses.replace(config.rollout, max_completions=rows)
        yield f"rollout.max_completions={rows}", dataclasses.replace(config, rollout=rollout)
        rows //= 2
    if learner.moments == "float32":
        yield "learner.moments=bfloat16", _learner(config, moments="bfloat16")
    if learner.moments != "8bit" and config.cluster.learner_ranks == 1 and has_eight_bits():
        yield "learner.moments=8bit", _learner(config, moments="8bit")
    if config.cluster.kind == "ray" and learner.moments != "8bit":
        for ranks in (2, 4, 8):
            if ranks > config.cluster.learner_ranks:
                cluster = dataclasses.replace(config.cluster, learner_ranks=ranks)
                yield f"cluster.learner_ranks={ranks}", dataclasses.replace(config, cluster=cluster)
    slow = resolve_device(config.model).type == "cpu" and bfloat16_speed() < SLOW_BFLOAT16
    if resolve_dtype(config.model) == "float32" and not slow:
        model = dataclasses.replace(config.model, dtype="bfloat16")
        yield "model.dtype=bfloat16", dataclasses.replace(config, model=model)
    if "vision" not in learner.freeze:
        frozen = (*learner.freeze, "vision")
        yield f"learner.freeze=[{','.join(frozen)}]", _learner(config, freeze=frozen)
    if config.algo.loss.kl_coef > 0:
        loss = dataclasses.replace(config.algo.loss, kl_coef=0.0)
        yield "algo.loss.kl_coef=0", dataclasses.replace(config, algo=dataclasses.replace(config.algo, loss=loss))
