"""Build policies and rollout engines from a configuration, in any process."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from learner.learner import PolicyLearner
from rlmed.cluster.memory import engines_that_pack, keep_freed_memory
from rlmed.core.config.schema import ModelConfig, RunConfig
from rlmed.core.weights import WeightSender
from rlmed.data.prompts import PROMPT_FILE, PromptRenderer, load_processor, read_prompt_settings
from rlmed.models.cpu.products import bfloat16_speed, settle_products
from rlmed.models.folder.agreement import check_agreement
from rlmed.models.loading import model_folder, resolve_device, resolve_dtype
from rlmed.models.policy import Policy, load_config, load_policy
from rlmed.recording.recorder import chosen_dtype, chosen_onednn
from rollout.engine import Engine
from rollout.fake import FakeEngine
from rollout.local import LocalPool
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2VLImageProcessorPil

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.8
"""Share of its worker's GPU memory that a vLLM engine takes."""
SLOW_BFLOAT16 = 0.5
"""Fraction of float32's speed below which bfloat16 does not pay off on a CPU: memory is not the bottleneck there."""


def settle_model(config: RunConfig, resumed: Path | None = None) -> RunConfig:
    """Decide `model.dtype` and `model.onednn` by CPU probes, for all processes; `config` is unchanged on a GPU.

    A run resumed in the folder `resumed` keeps its dtype and, on the same processor and torch, its use of oneDNN:
    another choice would round differently.
    """
    model = config.model
    if resolve_device(model).type != "cpu":
        if model.onednn is not None:
            log.warning("model.onednn=%s has no effect on a GPU", list(model.onednn))
        return config
    dtype = _settled_dtype(model, chosen_dtype(resumed) if resumed else None)
    uses = chosen_onednn(resumed) if resumed and model.onednn is None else model.onednn
    if uses is None:
        uses = settle_products(load_config(model_folder(model.path)), engines=engines_that_pack(config))
    return dataclasses.replace(config, model=dataclasses.replace(model, dtype=dtype, onednn=uses))


def _settled_dtype(model: ModelConfig, earlier: str | None) -> str:
    """Return `model.dtype`, or float32 if bfloat16 is slow on this CPU; a resumed run's dtype, `earlier`, is kept."""
    dtype = earlier or resolve_dtype(model)
    if dtype != "bfloat16" or (speed := bfloat16_speed()) >= SLOW_BFLOAT16:
        return dtype
    slow = f"this CPU multiplies bfloat16 matrices at {speed:.3g} of float32's speed"
    if earlier:
        log.warning("%s; the resumed run stays in bfloat16, a new run would use float32", slow)
        return dtype
    log.warning("model.dtype=bfloat16: %s, so float32 is used; set model.dtype=float32 to silence this", slow)
    return "float32"


def open_model(folder: Path) -> tuple[PreTrainedTokenizerBase, Qwen2VLImageProcessorPil | None]:
    """Load a model's tokenizer and image processor, checking that its files agree; doubts are logged.

    Raises:
        ValueError: if the model is not found, or its files are damaged or belong to different models.
    """
    config = load_config(folder)  # first: its error for a missing model says what to do
    tokenizer, image_processor = load_processor(folder)
    for doubt in check_agreement(folder, config, tokenizer, image_processor):
        log.warning("%s", doubt)
    return tokenizer, image_processor


def make_renderer(config: RunConfig) -> PromptRenderer:
    """Build the prompt renderer of the run's model."""
    folder = model_folder(config.model.path)
    if not folder.is_dir() and not folder.is_absolute():
        log.info("model %s is not a local folder: looking for it in the hub's cache and on the hub", folder)
    tokenizer, image_processor = open_model(folder)
    if image_processor is None:
        _warn_of_vision_settings(config)
    renderer = PromptRenderer(
        tokenizer,
        image_processor,
        max_prompt_tokens=config.data.max_prompt_tokens,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
        template=config.prompt.template,
        by_modality=config.prompt.by_modality,
    )
    if doubt := renderer.prefill_doubt():
        log.warning("%s", doubt)
    trained = read_prompt_settings(folder)
    if trained is not None and (trained["template"], trained["by_modality"]) != (
        renderer.template,
        renderer.by_modality,
    ):
        log.warning(
            "model %s was trained with another prompt than this run's: set prompt=NAME as in its training (text in its %s)",
            config.model.path,
            PROMPT_FILE,
        )
    return renderer


def _warn_of_vision_settings(config: RunConfig) -> None:
    """Warn about vision settings if the run's model is text-only."""
    model = config.model
    limits = {"model.min_pixels": model.min_pixels, "model.max_pixels": model.max_pixels}
    idle = [key for key, value in limits.items() if value is not None]
    idle += [f"learner.freeze={part}" for part in config.learner.freeze if part in ("vision", "merger")]
    if idle:
        log.warning("model %s is text-only, so these have no effect: %s", model.path, ", ".join(idle))


def build_policy(config: RunConfig, folder: Path) -> Policy:
    """Load the policy in `folder` on the run's device, in its dtype."""
    if config.cluster.threads:
        torch.set_num_threads(config.cluster.threads)
    device = resolve_device(config.model)
    if device.type == "cpu":
        keep_freed_memory()
    return load_policy(folder, dtype=resolve_dtype(config.model), device=device, onednn=config.model.onednn)


def engine_limits(config: RunConfig) -> EngineLimits:
    """Return the sizes that bound an engine's memory."""
    return EngineLimits(
        max_completions=config.rollout.max_completions,
        max_prompt_tokens=config.data.max_prompt_tokens,
        prefill_tokens=config.rollout.prefill_tokens,
    )


def build_local_pool(config: RunConfig, policy: Policy, renderer: PromptRenderer) -> LocalPool:
    """Build a pool with an engine in this process, sharing `policy`'s parameters."""
    if config.rollout.engine == "fake":
        return LocalPool(FakeEngine(renderer.completion_ids), on_push=config.rollout.on_push)
    return LocalPool(NativeEngine(policy, renderer.decode, engine_limits(config)), on_push=config.rollout.on_push)


def build_engine(config: RunConfig) -> Engine:
    """Build a rollout worker's engine with its own model: the run's base, until weights are pushed."""
    if config.rollout.engine == "vllm":
        return _build_vllm(config)
    if config.rollout.engine == "fake":
        return FakeEngine(make_renderer(config).completion_ids)
    policy = build_policy(config, model_folder(config.model.path))
    policy.model.requires_grad_(False)
    return NativeEngine(policy, make_renderer(config).decode, engine_limits(config))


def shares_gpus(config: RunConfig) -> bool:
    """Return True if a rollout worker has only part of a GPU, and the learner perhaps the rest."""
    return config.cluster.gpus_per_worker is not None and 0 < config.cluster.gpus_per_worker < 1


def memory_share(config: RunConfig) -> float:
    """Return the share of GPU memory for a vLLM engine: as set, else most of its worker's share of the GPU."""
    if config.rollout.gpu_memory_utilization is not None:
        return config.rollout.gpu_memory_utilization
    whole = config.cluster.gpus_per_worker if shares_gpus(config) else 1.0
    assert whole is not None
    return MEMORY_SHARE * whole


def _build_vllm(config: RunConfig) -> Engine:
    if config.cluster.threads:  # vLLM reads the thread counts of torch and OpenMP on import
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
    """Build the sender of weights from learner rank 0 to vLLM engines, GPU to GPU; `limit_s` bounds each call."""
    from rollout.vllm_backend.environment import import_vllm

    import_vllm()  # prepares the process, before the next import
    from rollout.vllm_backend.weight_transfer import WeightTransferSender

    policy = learner.policy
    shapes = {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in policy.model.named_parameters()}
    return WeightTransferSender(shapes, functools.partial(learner.full_weights, on_device=True), policy.device, limit_s)
