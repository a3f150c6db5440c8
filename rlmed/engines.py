"""From a configuration to policies and rollout engines, in whichever process they shall be."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from pathlib import Path

import torch

from learner.learner import PolicyLearner
from rlmed.core.config import ModelConfig, RunConfig
from rlmed.core.weights import WeightSender
from rlmed.data.prompts import PromptRenderer
from rlmed.memory import engines_that_pack, keep_freed_memory
from rlmed.models.policy import Policy, load_config, load_policy
from rlmed.models.products import bfloat16_speed, settle_products
from rlmed.recorder import chosen_dtype, chosen_onednn
from rlmed.setup import make_renderer, model_folder, resolve_device, resolve_dtype
from rollout.engine import Engine
from rollout.fake import FakeEngine
from rollout.local import LocalPool
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.8
"""Of the memory that a vLLM engine's worker has, what the engine takes."""
SLOW_BFLOAT16 = 0.5
"""Of float32's speed; below it nothing is won by bfloat16 on a CPU: memory is not what such models are short of."""


def settle_model(config: RunConfig, resumed: Path | None = None) -> RunConfig:
    """`config` with `model.dtype` and `model.onednn` decided by probes of the CPU, for all processes; unchanged on a GPU.

    The run in the folder `resumed` goes on from a checkpoint: it keeps its dtype, and on the processor and torch that it was
    started with what oneDNN computes. Another choice would round differently.
    """
    model = config.model
    if resolve_device(model).type != "cpu":
        if model.onednn is not None:
            log.warning("model.onednn=%s does nothing on a GPU", list(model.onednn))
        return config
    dtype = _settled_dtype(model, chosen_dtype(resumed) if resumed else None)
    uses = chosen_onednn(resumed) if resumed and model.onednn is None else model.onednn
    if uses is None:
        uses = settle_products(load_config(model_folder(model.path)), engines=engines_that_pack(config))
    return dataclasses.replace(config, model=dataclasses.replace(model, dtype=dtype, onednn=uses))


def _settled_dtype(model: ModelConfig, earlier: str | None) -> str:
    """`model.dtype`, or float32 in place of a bfloat16 that is slow on this CPU; `earlier` is what a resumed run has."""
    dtype = earlier or resolve_dtype(model)
    if dtype != "bfloat16" or (speed := bfloat16_speed()) >= SLOW_BFLOAT16:
        return dtype
    slow = f"this CPU multiplies bfloat16 matrices at {speed:.3g} of float32's speed"
    if earlier:
        log.warning("%s, and the run goes on in bfloat16 as it began: a new one would use float32", slow)
        return dtype
    log.warning("model.dtype=bfloat16: %s, so CPUs use float32; set model.dtype=float32 to say so yourself", slow)
    return "float32"


def build_policy(config: RunConfig, folder: Path) -> Policy:
    """The policy in `folder` on the run's device and in its dtype."""
    if config.cluster.threads:
        torch.set_num_threads(config.cluster.threads)
    device = resolve_device(config.model)
    if device.type == "cpu":
        keep_freed_memory()
    return load_policy(folder, dtype=resolve_dtype(config.model), device=device, onednn=config.model.onednn)


def engine_limits(config: RunConfig) -> EngineLimits:
    """Sizes that bound an engine's memory."""
    return EngineLimits(
        max_completions=config.rollout.max_completions,
        max_prompt_tokens=config.data.max_prompt_tokens,
        prefill_tokens=config.rollout.prefill_tokens,
    )


def build_local_pool(config: RunConfig, policy: Policy, renderer: PromptRenderer) -> LocalPool:
    """A pool with an engine in this process, on `policy`'s parameters."""
    if config.rollout.engine == "fake":
        return LocalPool(FakeEngine(renderer.completion_ids), on_push=config.rollout.on_push)
    return LocalPool(NativeEngine(policy, renderer.decode, engine_limits(config)), on_push=config.rollout.on_push)


def build_engine(config: RunConfig) -> Engine:
    """The engine of a rollout worker, with a model of its own: the run's base, until weights are pushed to it."""
    if config.rollout.engine == "vllm":
        return _build_vllm(config)
    if config.rollout.engine == "fake":
        return FakeEngine(make_renderer(config).completion_ids)
    policy = build_policy(config, model_folder(config.model.path))
    policy.model.requires_grad_(False)
    return NativeEngine(policy, make_renderer(config).decode, engine_limits(config))


def shares_gpus(config: RunConfig) -> bool:
    """True where a rollout worker has a part of a GPU only, and the learner perhaps the rest."""
    return config.cluster.worker_gpus is not None and 0 < config.cluster.worker_gpus < 1


def memory_share(config: RunConfig) -> float:
    """Share of a GPU's memory that a vLLM engine takes: as asked, else most of what its worker has of the GPU."""
    if config.rollout.gpu_memory_utilization is not None:
        return config.rollout.gpu_memory_utilization
    whole = config.cluster.worker_gpus if shares_gpus(config) else 1.0
    assert whole is not None
    return MEMORY_SHARE * whole


def _build_vllm(config: RunConfig) -> Engine:
    if config.cluster.threads:  # vLLM takes what torch and OpenMP have when it is imported
        torch.set_num_threads(config.cluster.threads)
        os.environ["OMP_NUM_THREADS"] = str(config.cluster.threads)
    rollout, on_cpu = config.rollout, resolve_device(config.model).type == "cpu"
    from rollout.vllm_backend.engine import VllmEngine
    from rollout.vllm_backend.settings import VllmSettings

    settings = VllmSettings(
        dtype=resolve_dtype(config.model),
        max_completions=rollout.max_completions,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_tokens=max(rollout.max_tokens, config.eval.max_tokens),
        gpu_memory_utilization=memory_share(config),
        tensor_parallel_size=rollout.tensor_parallel_size,
        kv_cache_gib=rollout.kv_cache_gib,
        enforce_eager=on_cpu if rollout.enforce_eager is None else rollout.enforce_eager,
        sleep=bool(config.rollout.sleep),
        seed=config.seed,
    )
    return VllmEngine(model_folder(config.model.path), settings)


def build_sender(learner: PolicyLearner, *, limit_s: float) -> WeightSender:
    """What learner rank 0 sends its weights to vLLM's engines by, from GPU to GPU; `limit_s` bounds each of its calls."""
    from rollout.vllm_backend.sender import WeightTransferSender

    policy = learner.policy
    shapes = {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in policy.model.named_parameters()}
    return WeightTransferSender(shapes, functools.partial(learner.full_weights, on_device=True), policy.device, limit_s)
