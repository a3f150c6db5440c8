"""Registry of model families: token positions, parts, and tokens that a policy must not sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rlmed.core.types import BoxFrame

Images = Mapping[str, Tensor]
"""A row's image tensors, see `Prompt.image_inputs`."""
PositionFn = Callable[[PreTrainedModel, Tensor, Mapping[str, Tensor]], Tensor]

PARTS = ("vision", "merger", "language_model")
"""Parts of a model, for freezing (`learner.freeze`) and counting."""


def _text_positions(model: PreTrainedModel, token_ids: Tensor, image_inputs: Mapping[str, Tensor]) -> Tensor:
    """Return positions 0, 1, 2, ... of a text-only prompt, [1, P]."""
    return torch.arange(len(token_ids), device=token_ids.device).unsqueeze(0)


def _mrope_positions(model: PreTrainedModel, token_ids: Tensor, image_inputs: Mapping[str, Tensor]) -> Tensor:
    """Return temporal, height and width positions as in transformers, [3, P].

    They are those of M-RoPE, arXiv 2409.12191.
    """
    if not image_inputs:
        return _text_positions(model, token_ids, image_inputs).expand(3, -1)
    is_image = (token_ids == model.config.image_token_id).to(torch.int32)
    base: Any = model.base_model  # the families share no class that has get_rope_index
    positions: Tensor = base.get_rope_index(
        token_ids.unsqueeze(0), is_image.unsqueeze(0), image_grid_thw=image_inputs["image_grid_thw"]
    )[0]
    return positions[:, 0]


def _as_they_are(images: Images) -> Images:
    return images


def _as_one_sample(images: Images) -> Images:
    """Return the tiles [tiles, ...] as those of one sample, [1, tiles, ...]."""
    return {name: tensor.unsqueeze(0) for name, tensor in images.items()}


@dataclass(frozen=True, slots=True)
class VllmTiles:
    """Names of the arguments that vLLM's class of a family takes beside tiles."""

    count: str | None = None
    """Number of tiles; None: it cuts tiles again by `image_sizes`."""
    mask: str | None = None
    """Pixels of each tile that are not padding."""
    token_id: str | None = None
    """Id of the placeholder."""


@dataclass(frozen=True, slots=True)
class Family:
    """Properties of a transformers `model_type` that rlmed depends on."""

    vision: bool
    positions: PositionFn
    position_rows: int = 1
    """Rows of positions: 3 for M-RoPE, else 1."""
    arguments: Callable[[Images], Images] = _as_they_are
    """Turns a row's image tensors into forward arguments."""
    patches_per_token: Callable[[PreTrainedConfig], int] = lambda _: 1
    """Patches of the vision tower that become one visual token."""
    grids: bool = False
    """Pictures are patches along one axis, with `image_grid_thw`; else tiles of one size."""
    box_frame: BoxFrame = "thousandths"
    """Units of the boxes that its models were trained to write; thousandths if they were not."""
    both_ways: bool = False
    """Visual tokens of an image also attend to its later ones."""
    vllm_tiles: VllmTiles | None = None
    """How vLLM takes tiles; None if it takes none."""
    vllm_names: tuple[tuple[str, str | None], ...] = ()
    """(pattern in a parameter's name, replacement) before vLLM's own; None drops the parameter."""
    part_prefixes: tuple[tuple[str, str], ...] = ()
    """(parameter name prefix, part); the first match wins, everything else is "language_model"."""

    def part_of(self, parameter_name: str) -> str:
        """Return the part, one of `PARTS`, to which a parameter belongs."""
        for prefix, part in self.part_prefixes:
            if parameter_name.startswith(prefix):
                return part
        return "language_model"


_TEXT = Family(vision=False, positions=_text_positions)
_QWEN_VL = Family(
    vision=True,
    positions=_mrope_positions,
    position_rows=3,
    patches_per_token=lambda config: config.vision_config.spatial_merge_size**2,
    grids=True,
    part_prefixes=(
        ("model.visual.merger.", "merger"),
        ("model.visual.deepstack_merger_list.", "merger"),  # of Qwen3-VL
        ("model.visual.", "vision"),
    ),
)
_IDEFICS3 = Family(
    vision=True,
    positions=_text_positions,
    arguments=_as_one_sample,
    patches_per_token=lambda config: config.scale_factor**2,
    vllm_tiles=VllmTiles(count="num_patches", mask="pixel_attention_mask"),
    part_prefixes=(("model.vision_model.", "vision"), ("model.connector.", "merger")),
)
_TOWER_AND_PROJECTOR = (
    ("model.vision_tower.", "vision"),
    ("model.multi_modal_projector.", "merger"),
    ("model.image_newline", "merger"),
)
_INTERNVL = Family(
    vision=True,
    positions=_text_positions,
    patches_per_token=lambda config: round(1 / config.downsample_ratio) ** 2,
    vllm_tiles=VllmTiles(count="image_num_patches", token_id="image_token_id"),
    part_prefixes=_TOWER_AND_PROJECTOR,
)
_LLAVA_ONEVISION = Family(
    vision=True,
    positions=_text_positions,
    vllm_tiles=VllmTiles(),
    vllm_names=(
        (r"^(model\.)?vision_tower\.(?!vision_model\.)", r"\1vision_tower.vision_model."),
        (r"\.vision_model\.post_layernorm\.", None),  # its output is not used
    ),
    part_prefixes=_TOWER_AND_PROJECTOR,
)
_GEMMA3 = Family(
    vision=True,
    positions=_text_positions,
    patches_per_token=lambda config: (
        (config.vision_config.image_size // config.vision_config.patch_size) ** 2 // config.mm_tokens_per_image
    ),
    both_ways=True,
    part_prefixes=_TOWER_AND_PROJECTOR,
)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": replace(
        _QWEN_VL, box_frame="pixels"
    ),  # between two of thousandths, github.com/QwenLM/Qwen3-VL/issues/676
    "qwen3_vl": _QWEN_VL,
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "gemma3": _GEMMA3,
    "internvl": _INTERNVL,
    "llava_onevision": _LLAVA_ONEVISION,
    "qwen2": _TEXT,
    "qwen3": _TEXT,
    "llama": _TEXT,
    "gemma3_text": _TEXT,
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model's configuration.

    Raises:
        ValueError: for an unregistered `model_type`, or a decoder that cannot run here.
    """
    _refuse(config)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            "To add a family, add an entry in rlmed/models/families.py"
        )
    return FAMILIES[config.model_type]


def _refuse(config: PreTrainedConfig) -> None:
    """Raise a ValueError for a decoder that no registration could make run."""
    text = config.get_text_config().to_dict()
    name = f"model_type {config.model_type!r}"
    others = sorted({*(text.get("layer_types") or ())} - {"full_attention", "sliding_attention"})
    if others:
        raise ValueError(
            f"{name} has layers of {', '.join(others)}: rlmed computes a prompt once for all its completions by the keys and "
            "values that it leaves, so use a model whose layers all have attention, full or within a sliding window"
        )
    if shared := text.get("num_kv_shared_layers"):
        raise ValueError(
            f"{name}: its last {shared} layers read the keys and values of earlier ones and have none of their own, which "
            "rlmed's caches and packed rows need in every layer: use a model with num_kv_shared_layers=0"
        )
    per_layer = (text.get("per_layer_config") or {}).values()
    widths = {layer.get("head_dim") for layer in per_layer} | {text.get("head_dim")}
    if len(found := sorted(width for width in widths if width)) > 1:
        raise ValueError(
            f"{name}: its layers have heads of {' and '.join(map(str, found))} features, and rlmed's caches have one width: "
            "use a model whose layers are alike"
        )
    if text.get("use_bidirectional_attention") is True:
        raise ValueError(f"{name}: its tokens attend to later tokens, so it cannot write: use a model that does")
    if cap := text.get("final_logit_softcapping") or text.get("attn_logit_softcapping"):
        raise ValueError(
            f"{name}: rlmed does not compute the soft caps on logits or scores that its config.json sets ({cap:g})"
        )


def unsampleable_token_ids(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the ids of image content; a forward pass would take a sampled one for an image."""
    names = (
        "image_token",
        "video_token",
        "vision_token",
        "vision_start_token",
        "vision_end_token",
        "boi_token",
        "eoi_token",
    )
    values = config.to_dict()
    # older families say "index"
    found = (values.get(f"{name}_{suffix}") for name in names for suffix in ("id", "index"))
    # a placeholder beyond the vocabulary cannot be sampled anyway
    sampled = config.get_text_config().vocab_size
    return tuple(sorted({int(value) for value in found if value is not None and value < sampled}))
