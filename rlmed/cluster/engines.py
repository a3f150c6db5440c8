"""Build policies, renderers and local engines from their configuration sections, in any process."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image

from rlmed.cluster.memory import keep_freed_memory
from rlmed.core.config.running import ClusterConfig, RolloutConfig
from rlmed.core.config.schema import DataConfig, LoraConfig, ModelConfig, PromptConfig
from rlmed.core.process.foreign import foreign
from rlmed.core.types import BoxFrame
from rlmed.data.pictures import Pictures
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.data.templates import PROMPT_FILE, read_prompt_settings
from rlmed.models.adapters import add_adapters
from rlmed.models.cpu.compiler import missing_library
from rlmed.models.cpu.products import bfloat16_speed, linear_shapes, may_pack, settle_products
from rlmed.models.families import family_of
from rlmed.models.folder.agreement import check_agreement, check_visual_tokens
from rlmed.models.loading import model_folder, resolve_device, resolve_dtype
from rlmed.models.policy import Policy, load_config, load_policy
from rlmed.recording.inputs import chosen_compiled, chosen_dtype, chosen_onednn
from rlmed.tasks.registry import settle_tasks, task_named
from rollout.fake import FakeEngine
from rollout.local import LocalPool
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
MAX_PROMPT_TOKENS = 4096
"""Default if a model folder does not record the prompt length of training."""
PROBE_SIZE = (96, 64)
"""Of a picture with which a model's processor is compared with its configuration."""

MEMORY_SHARE = 0.8
"""Share of its worker's GPU memory that a vLLM engine takes."""
SLOW_BFLOAT16 = 0.5
"""On a CPU, bfloat16 below this share of float32's speed does not pay: memory is no bottleneck."""


def settle_model(model: ModelConfig, *, engines: int, resumed: Path | None = None) -> ModelConfig:
    """Decide `model.dtype`, `onednn` and `compiled_decode` on a CPU for all processes.

    `engines` counts those that hold packed weights on one machine (`engines_that_pack`).

    A run resumed in the folder `resumed` keeps its dtype and, on the same processor and torch, the
    other choices: another one would round differently. No change on a GPU.
    """
    if resolve_device(model).type != "cpu":
        for name, value in (("onednn", model.onednn), ("compiled_decode", model.compiled_decode)):
            if value is not None:
                log.warning("model.%s=%s has no effect on a GPU", name, value)
        return model
    dtype = _settled_dtype(model, chosen_dtype(resumed) if resumed else None)
    uses = chosen_onednn(resumed) if resumed and model.onednn is None else model.onednn
    compiled = chosen_compiled(resumed) if resumed and model.compiled_decode is None else model.compiled_decode
    if uses is None or compiled is None:
        config = load_config(model_folder(model.path))
        uses = settle_products(config, engines=engines) if uses is None else uses
        compiled = may_compile(config, dtype, engines) if compiled is None else compiled
    return dataclasses.replace(model, dtype=dtype, onednn=uses, compiled_decode=compiled)


def may_compile(config: PreTrainedConfig, dtype: str, engines: int) -> bool:
    """Return whether decode steps can be compiled here, and packed weights have room."""
    return dtype == "float32" and may_pack(linear_shapes(config), engines=engines) and not missing_library()


def _settled_dtype(model: ModelConfig, earlier: str | None) -> str:
    """Return `model.dtype`, or float32 if bfloat16 is slow on this CPU.

    A resumed run's dtype, `earlier`, is kept.
    """
    dtype = earlier or resolve_dtype(model)
    if dtype != "bfloat16" or (speed := bfloat16_speed()) >= SLOW_BFLOAT16:
        return dtype
    slow = f"this CPU multiplies bfloat16 matrices at {speed:.3g} of float32's speed"
    if earlier:
        log.warning("%s; the resumed run stays in bfloat16, a new run would use float32", slow)
        return dtype
    log.warning("model.dtype=bfloat16: %s, so float32 is used; set model.dtype=float32 to silence this", slow)
    return "float32"


def open_model(folder: Path) -> tuple[PreTrainedTokenizerBase, Pictures | None]:
    """Load a model's tokenizer and rules for pictures; check that its files agree, and log doubts.

    Raises:
        ValueError: if the model is not found, or its files are damaged or belong to different
            models.
    """
    config = load_config(folder)  # first: its error for a missing model says what to do
    family_of(config)  # a family that cannot run says so before its files are compared
    tokenizer, pictures = load_processor(folder)
    for doubt in check_agreement(folder, config, tokenizer, pictures.image_processor if pictures else None):
        log.warning("%s", doubt)
    if pictures is not None:
        shown = pictures.prepare([Image.new("RGB", PROBE_SIZE, "grey")])
        with foreign(
            f"the tokenizer of model {str(folder)!r} cannot be used",
            "Copy tokenizer.json and tokenizer_config.json again",
        ):
            token_ids = tokenizer(shown.texts[0], add_special_tokens=False, verbose=False)["input_ids"]
        check_visual_tokens(folder, config, np.asarray(token_ids), shown.inputs)
    return tokenizer, pictures


def make_renderer(
    model: ModelConfig,
    data: DataConfig,
    prompt: PromptConfig,
    *,
    freeze: Sequence[str] = (),
    checkpoint: Path | None = None,
) -> PromptRenderer:
    """Build the prompt renderer of the run's model.

    Warns of settings that a text-only model ignores, frozen parts of the model in training among
    them. A run resumed from `checkpoint` keeps its units of boxes.
    """
    settle_tasks(data.extra_tasks, data.synonyms)
    for name in prompt.by_task:
        if task_named(name, "prompt.by_task: task").name == "choice":
            raise ValueError("prompt.by_task.choice is not read: set prompt.template, which is that of multiple choice")
    folder = model_folder(model.path)
    if not folder.is_dir() and not folder.is_absolute():
        log.info("model %s is not a local folder: looking for it in the hub's cache and on the hub", folder)
    tokenizer, pictures = open_model(folder)
    if pictures is None:
        _warn_of_vision_settings(model, freeze)
    renderer = PromptRenderer(
        tokenizer,
        pictures,
        max_prompt_tokens=data.max_prompt_tokens,
        max_images=data.max_images,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
        template=prompt.template,
        by_modality=prompt.by_modality,
        by_task=prompt.by_task,
        box_frame=_box_frame(data, checkpoint or folder),
    )
    if doubt := renderer.prefill_doubt():
        log.warning("%s", doubt)
    trained = read_prompt_settings(folder)
    # an earlier version knew one task, and recorded no templates of others
    known = (trained or {}).keys() - {"max_prompt_tokens", "box_frame"}
    ours = {key: value for key, value in renderer.templates.to_json().items() if key in known}
    if trained is not None and {key: trained[key] for key in known} != ours:
        log.warning(
            "model %s was trained with another prompt than this run's: set prompt=NAME as in its training (text in its %s)",
            model.path,
            PROMPT_FILE,
        )
    if trained is not None and (frame := trained.get("box_frame", "thousandths")) != renderer.templates.box_frame:
        log.warning("model %s was trained with data.box_frame=%s, not %s", model.path, frame, data.box_frame)
    return renderer


def _box_frame(data: DataConfig, folder: Path) -> BoxFrame:
    """Return the units of boxes: as set or, for auto, as the model in `folder` writes them."""
    return model_box_frame(folder) if data.box_frame == "auto" else cast(BoxFrame, data.box_frame)


def model_box_frame(folder: Path) -> BoxFrame:
    """Return the units in which a model writes boxes: of its training by rlmed, or its family's."""
    trained = read_prompt_settings(folder)
    if trained is None:
        return family_of(load_config(folder)).box_frame
    frame: BoxFrame = trained.get("box_frame", "thousandths")  # earlier versions had no others
    return frame


def recorded_renderer(folder: Path) -> PromptRenderer:
    """Build the renderer of a model folder with the prompt of its training.

    Without a record of it, that is the paper's, of at most `MAX_PROMPT_TOKENS`, with boxes as its
    family writes them.

    Raises:
        ValueError: see `open_model` and `read_prompt_settings`.
    """
    settings = {"max_prompt_tokens": MAX_PROMPT_TOKENS, **(read_prompt_settings(folder) or {})}
    return PromptRenderer(*open_model(folder), **settings | {"box_frame": model_box_frame(folder)})


def _warn_of_vision_settings(model: ModelConfig, freeze: Sequence[str]) -> None:
    """Warn about vision settings of a text-only model."""
    limits = {"model.min_pixels": model.min_pixels, "model.max_pixels": model.max_pixels}
    idle = [key for key, value in limits.items() if value is not None]
    idle += [f"learner.freeze={part}" for part in freeze if part in ("vision", "merger")]
    if idle:
        log.warning("model %s is text-only, so these have no effect: %s", model.path, ", ".join(idle))


def build_policy(model: ModelConfig, folder: Path, *, threads: int | None, quantize: Sequence[str] = ()) -> Policy:
    """Load the policy in `folder` on the run's device, in its dtype.

    `threads` of torch, None for as many as it has; `quantize` as in `load_policy`.
    """
    if threads:
        torch.set_num_threads(threads)
    device = resolve_device(model)
    if device.type == "cpu":
        keep_freed_memory()
    return load_policy(
        folder,
        dtype=resolve_dtype(model),
        device=device,
        onednn=model.onednn,
        compiled_decode=model.compiled_decode,
        quantize=quantize,
    )


def build_policies(
    model: ModelConfig, lora: LoraConfig, *, checkpoint: Path | None, seed: int, threads: int | None, samples: bool
) -> tuple[Policy, Policy]:
    """Load the policy to train, and the one that an engine in this process samples from.

    Without adapters, or such an engine, they are one. With both, they share all weights but the
    adapted ones; of these the second has merged copies, unless the first keeps them in 4 bits: then
    it samples itself.

    Args:
        model: its settings.
        lora: its adapters.
        checkpoint: of the trained policy; None for the model as it is.
        seed: of new adapters.
        threads: of torch, see `build_policy`.
        samples: whether there is an engine in this process.
    """
    base = model_folder(model.path)
    if lora.rank is None:
        policy = build_policy(model, checkpoint or base, threads=threads)
        return policy, policy
    sampling = build_policy(model, base, threads=threads, quantize=lora.target if lora.quantize else ())
    trained = add_adapters(sampling, lora, base=_lasting_name(model.path), seed=seed)
    assert trained.adapters is not None
    if checkpoint is not None:
        trained.adapters.load(checkpoint)
    if lora.quantize or not samples:
        return trained, trained
    trained.adapters.give_to(sampling)
    return trained, sampling


def _lasting_name(path: str) -> str:
    """Return a model's name as an adapter's settings keep it, for any working folder."""
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def engine_limits(rollout: RolloutConfig, max_prompt_tokens: int) -> EngineLimits:
    """Return the sizes that bound an engine's memory."""
    return EngineLimits(
        max_completions=rollout.max_completions,
        max_prompt_tokens=max_prompt_tokens,
        prefill_tokens=rollout.prefill_tokens,
    )


def build_local_pool(rollout: RolloutConfig, policy: Policy, renderer: PromptRenderer) -> LocalPool:
    """Build a pool with an engine in this process, sharing `policy`'s parameters."""
    if rollout.engine == "fake":
        return LocalPool(FakeEngine(renderer.completion_ids), on_push=rollout.on_push)
    limits = engine_limits(rollout, renderer.max_prompt_tokens)
    return LocalPool(NativeEngine(policy, renderer.decode, limits), on_push=rollout.on_push)


def shares_gpus(cluster: ClusterConfig) -> bool:
    """Return True if a rollout worker has only part of a GPU, and the learner perhaps the rest."""
    return cluster.gpus_per_worker is not None and 0 < cluster.gpus_per_worker < 1


def memory_share(rollout: RolloutConfig, cluster: ClusterConfig) -> float:
    """Return a vLLM engine's share of GPU memory: as set, else most of its worker's share."""
    if rollout.gpu_memory_utilization is not None:
        return rollout.gpu_memory_utilization
    whole = cluster.gpus_per_worker if shares_gpus(cluster) else 1.0
    assert whole is not None
    return MEMORY_SHARE * whole
