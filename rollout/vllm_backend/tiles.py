"""Pictures in tiles, as vLLM's models take them.

vLLM is told where an image's tokens begin and end, and by a mask which of them are visual. All
tiles of a prompt, of whatever pictures, are one such image, unless the model cuts tiles again.
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
        prompt: with pictures, or none.
        facts: see `tile_facts`.
        rules: vLLM's `ProcessingInfo` of the model.

    Raises:
        ValueError: if not, naming both numbers.
    """
    written = int((prompt.token_ids == facts.image_token_id).sum())
    tiles = prompt.image_inputs.get("pixel_values", np.zeros((0, 3, 0, 0), dtype=np.float32))
    made = tiles[:, 0].size // facts.pixels_per_token
    if facts.arguments.count is None and len(tiles) > 0:
        sizes = prompt.image_inputs["image_sizes"].tolist()
        if len(sizes) == 1:
            made = rules.get_num_image_tokens(image_height=sizes[0][0], image_width=sizes[0][1])
        else:  # each of several is one tile, closed by one token
            made += len(sizes)
    if written != made:
        raise ValueError(
            f"prompt {prompt.example.id!r} has {written} image placeholders, but vLLM makes {made} visual tokens of its "
            f"{len(tiles)} tiles: render it with this model's processor, or use rollout=native"
        )


def tile_ranges(prompt: Prompt, facts: TileFacts) -> list[PlaceholderRange]:
    """Return where the visual tokens of each of vLLM's images are."""
    from vllm.multimodal.inputs import PlaceholderRange

    visual = prompt.token_ids == facts.image_token_id
    (indices,) = np.nonzero(visual)
    spans = [(int(own[0]), int(own[-1]) + 1) for own in np.split(indices, _vllm_images(prompt, facts))]
    return [
        PlaceholderRange(offset=first, length=end - first, is_embed=torch.from_numpy(visual[first:end]))
        for first, end in spans
    ]


def tile_items(prompt: Prompt, facts: TileFacts) -> MultiModalKwargsItems:
    """Return a prompt's tiles, and what vLLM's class of the model takes beside them."""
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    names, tiles = facts.arguments, torch.as_tensor(prompt.image_inputs["pixel_values"])
    single = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
    inputs: dict[str, tuple[Tensor, MultiModalFieldConfig]] = {}
    if names.count is None:
        images = _vllm_images(prompt, facts)
        inputs["pixel_values"] = (tiles.unflatten(0, (images, -1)), MultiModalFieldConfig.batched("image"))
        inputs["image_sizes"] = (torch.as_tensor(prompt.image_inputs["image_sizes"]), single)
    else:
        count = torch.tensor([len(tiles)])
        all_of_them = MultiModalFieldConfig.flat_from_sizes("image", count)
        inputs["pixel_values"], inputs[names.count] = (tiles, all_of_them), (count, single)
        if names.mask:
            inputs[names.mask] = (torch.ones_like(tiles[:, 0], dtype=torch.bool), all_of_them)
        if names.token_id:
            inputs[names.token_id] = (torch.tensor([facts.image_token_id]), single)
    return MultiModalKwargsItems.from_hf_inputs(
        {name: tensor for name, (tensor, _) in inputs.items()}, {name: field for name, (_, field) in inputs.items()}
    )


def _vllm_images(prompt: Prompt, facts: TileFacts) -> int:
    """Return the number of images that a prompt with pictures has for vLLM."""
    return 1 if facts.arguments.count else len(prompt.image_inputs["image_sizes"])
