"""Compare a run's memory with what the device has before anything is loaded; refuse in time and say what would fit."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

import torch

from rlmed.cluster.memory import (
    GIB,
    PROCESS_BYTES,
    Batch,
    MemoryEstimate,
    engine_memory,
    learner_memory,
    packed_weights,
    together,
)
from rlmed.core.config.schema import RunConfig
from rlmed.core.process.threads import available_memory
from rlmed.models.loading import model_folder, resolve_dtype
from rlmed.models.policy import load_config
from rlmed.models.size import ModelSize, meta_model

log = logging.getLogger(__name__)

MIN_BUDGET = 1024
"""Smallest `learner.token_budget` that is proposed."""
Estimate = Callable[[RunConfig], MemoryEstimate]
"""Estimates the memory of a process under changed settings."""


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still take on the device; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def model_size(config: RunConfig) -> ModelSize:
    """Return the sizes of the run's model, which is not loaded."""
    return ModelSize.of(meta_model(load_config(model_folder(config.model.path))))


def local_estimate(size: ModelSize, *, engines: int, pictures: int, on_cpu: bool) -> Estimate:
    """Return the estimate of a process that learns and samples, with `engines` that may hold packed weights."""

    def estimate(config: RunConfig) -> MemoryEstimate:
        model, dtype = load_config(model_folder(config.model.path)), resolve_dtype(config.model)
        engine = engine_memory(
            size,
            config.rollout,
            dtype=dtype,
            group_size=config.algo.group_size,
            prompt_tokens=config.data.max_prompt_tokens,
            eval_tokens=config.eval.max_tokens,
            overlapped=config.algo.max_staleness > 0,
            packed=packed_weights(model, config.model, dtype=dtype, engines=engines),
        )
        return together(rank_estimate(size, on_cpu=on_cpu)(config), engine, pictures)

    return estimate


def rank_estimate(size: ModelSize, *, on_cpu: bool, engine_bytes: int = 0) -> Estimate:
    """Return the estimate of a learner rank beside an engine that takes `engine_bytes` of its GPU."""

    def estimate(config: RunConfig) -> MemoryEstimate:
        memory = learner_memory(
            size,
            config.learner,
            Batch.of_run(config, size),
            dtype=resolve_dtype(config.model),
            on_cpu=on_cpu,
            reference=config.algo.loss.kl_coef > 0,
            checkpointing=bool(config.learner.gradient_checkpointing),
            ranks=config.cluster.learner_ranks,
        )
        return dataclasses.replace(memory, engine=engine_bytes)

    return estimate


def settle_memory(
    config: RunConfig, estimate: Estimate, *, where: str, available: int | None, processes: int = 1
) -> RunConfig:
    """Decide `learner.gradient_checkpointing`, and refuse a run that would not fit.

    Args:
        config: the run.
        estimate: of one process.
        where: the device in words.
        available: bytes that it has left; None if unknown, which refuses nothing.
        processes: equal ones that share it.

    Raises:
        ValueError: with what is needed, what there is, and the settings that would fit.
    """

    def fits(changed: RunConfig) -> bool:
        return available is None or needed(changed) <= available

    def needed(changed: RunConfig) -> int:
        return processes * (estimate(changed).peak + PROCESS_BYTES)

    if config.learner.gradient_checkpointing is None:
        without, recomputed = (_learner(config, gradient_checkpointing=value) for value in (False, True))
        config = without if fits(without) else recomputed
        if config is recomputed:
            log.info(
                "learner.gradient_checkpointing: on, since %.1f GiB would be needed without and %s has %.1f",
                needed(without) / GIB,
                where,
                (available or 0) / GIB,
            )
    log.info("%s", estimate(config).line())
    if not fits(config):
        parts = sorted(estimate(config).parts().items(), key=lambda part: -part[1])[:4]
        terms = ", ".join(f"{name} {processes * size / GIB:.1f}" for name, size in parts)
        raise ValueError(
            f"this run needs up to {needed(config) / GIB:.1f} GiB of memory and {where} has {(available or 0) / GIB:.1f} "
            f"({terms}): {_advice(config, fits, needed)}"
        )
    return config


def _learner(config: RunConfig, **changes: object) -> RunConfig:
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, **changes))  # type: ignore[arg-type]


def _advice(config: RunConfig, fits: Callable[[RunConfig], bool], needed: Callable[[RunConfig], int]) -> str:
    """Return the settings that would fit: those that do alone, else as many together as it takes."""
    alone = [text for text, changed in _changes(config) if fits(changed)]
    if alone:
        return f"set {' or '.join(alone[:3])}"
    changed, taken = config, list[str]()
    for name in dict.fromkeys(text.partition("=")[0] for text, _ in _changes(config)):
        options = [entry for entry in _changes(changed) if entry[0].startswith(f"{name}=")]
        if not options:
            continue
        text, smaller = min(options, key=lambda entry: needed(entry[1]))
        if needed(smaller) < needed(changed):
            changed = smaller
            taken.append(text)
        if fits(changed):
            return f"set {' '.join(taken)}"
    return f"even {' '.join(taken)} would need {needed(changed) / GIB:.1f}: use a smaller model or a device with more memory"


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
    if learner.moments != "8bit":
        yield "learner.moments=8bit", _learner(config, moments="8bit")
    if config.cluster.kind == "ray":
        for ranks in (2, 4, 8):
            if ranks > config.cluster.learner_ranks:
                cluster = dataclasses.replace(config.cluster, learner_ranks=ranks)
                yield f"cluster.learner_ranks={ranks}", dataclasses.replace(config, cluster=cluster)
    if resolve_dtype(config.model) == "float32":
        model = dataclasses.replace(config.model, dtype="bfloat16")
        yield "model.dtype=bfloat16", dataclasses.replace(config, model=model)
    if "vision" not in learner.freeze:
        yield "learner.freeze=[vision]", _learner(config, freeze=(*learner.freeze, "vision"))
    if config.algo.loss.kl_coef > 0:
        loss = dataclasses.replace(config.algo.loss, kl_coef=0.0)
        yield "algo.loss.kl_coef=0", dataclasses.replace(config, algo=dataclasses.replace(config.algo, loss=loss))
