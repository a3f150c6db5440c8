"""Pictures in tiles, as vLLM's models take them.

All tiles of a prompt are one image to vLLM: its span runs from the first visual token to the last,
and a mask says which tokens in between are visual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rlmed.core.types import Prompt
from rlmed.models.families import VllmTiles, family_of

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange


@dataclass(frozen=True, slots=True)
class TileFacts:
    """How a model takes tiles."""

    arguments: VllmTiles
    image_token_id: int
    pixels_per_token: int
    """Of one tile."""


def tile_facts(config: PreTrainedConfig) -> TileFacts | None:
    """Return a model's facts; None if it has patches with grids, or no pictures.

    Raises:
        ValueError: if vLLM does not compute the model's pictures as the learner does.
    """
    family = family_of(config)
    if family.both_ways:
        raise ValueError(
            f"rollout=vllm does not compute model_type {config.model_type!r} as the learner does: in vLLM's attention on CPUs "
            "the tokens of an image see earlier ones only, and on GPUs it was not compared; use rollout=native"
        )
    if family.vllm_tiles is None:
        return None
    patch = config.vision_config.patch_size
    side = patch if isinstance(patch, int) else patch[0]
    return TileFacts(family.vllm_tiles, config.image_token_id, side**2 * family.patches_per_token(config))


def check_tiles(prompt: Prompt, facts: TileFacts, rules: Any) -> None:
    """Check that vLLM makes as many visual tokens of a prompt's tiles as the prompt has.

    Args:
        prompt: with or without a picture.
        facts: see `tile_facts`.
        rules: vLLM's `ProcessingInfo` of the model.

    Raises:
        ValueError: if not, naming both numbers.
    """
    written = int((prompt.token_ids == facts.image_token_id).sum())
    tiles = prompt.image_inputs.get("pixel_values", np.zeros((0, 3, 0, 0), dtype=np.float32))
    if facts.arguments.count is not None or len(tiles) == 0:
        made = tiles[:, 0].size // facts.pixels_per_token
    else:
        sizes = prompt.image_inputs["image_sizes"].tolist()
        made = sum(rules.get_num_image_tokens(image_height=height, image_width=width) for height, width in sizes)
    if written != made:
        raise ValueError(
            f"prompt {prompt.example.id!r} has {written} image placeholders, but vLLM makes {made} visual tokens of its "
            f"{len(tiles)} tiles: render it with this model's processor, or use rollout=native"
        )


def tile_range(prompt: Prompt, facts: TileFacts) -> PlaceholderRange:
    """Return where a prompt's visual tokens are."""
    from vllm.multimodal.inputs import PlaceholderRange

    visual = prompt.token_ids == facts.image_token_id
    (indices,) = np.nonzero(visual)
    first, end = int(indices[0]), int(indices[-1]) + 1
    return PlaceholderRange(offset=first, length=end - first, is_embed=torch.from_numpy(visual[first:end]))


def tile_items(prompt: Prompt, facts: TileFacts) -> MultiModalKwargsItems:
    """Return a prompt's tiles, and what vLLM's class of the model takes beside them."""
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    names, tiles = facts.arguments, torch.as_tensor(prompt.image_inputs["pixel_values"])
    whole = MultiModalFieldConfig.batched("image")  # one entry for the one image
    apart = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
    flat = MultiModalFieldConfig.flat_from_sizes("image", torch.tensor([len(tiles)]))
    inputs: dict[str, tuple[Tensor, MultiModalFieldConfig]] = {
        name: (torch.as_tensor(value), apart) for name, value in prompt.image_inputs.items()
    }
    inputs["pixel_values"] = (tiles, flat) if names.count else (tiles.unsqueeze(0), whole)
    if names.count:
        inputs[names.count] = (torch.tensor([len(tiles)]), apart)
    if names.mask:
        inputs[names.mask] = (torch.ones_like(tiles[:, 0], dtype=torch.bool), flat)
    if names.token_id:
        inputs[names.token_id] = (torch.tensor([facts.image_token_id]), apart)
    return MultiModalKwargsItems.from_hf_inputs(
        {name: tensor for name, (tensor, _) in inputs.items()}, {name: field for name, (_, field) in inputs.items()}
    )
