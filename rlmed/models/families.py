"""Registry of model families: token positions, parts, and tokens that a policy must not sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

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
    part_prefixes=(("model.vision_model.", "vision"), ("model.connector.", "merger")),
)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "qwen2": _TEXT,
    "qwen3": _TEXT,
    "llama": _TEXT,
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a model's configuration.

    Raises:
        ValueError: for an unregistered `model_type`, or a decoder with sliding-window attention.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}. "
            "To add a family, add an entry in rlmed/models/families.py"
        )
    text_config = config.get_text_config()
    if "sliding_attention" in (text_config.to_dict().get("layer_types") or ()):
        raise ValueError(f"{config.model_type} with sliding-window attention layers is not supported")
    return FAMILIES[config.model_type]


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
    return tuple(sorted({int(value) for value in found if value is not None}))
