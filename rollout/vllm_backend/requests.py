"""Translate requests and outputs to and from vLLM's types."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlmed.core.types import Completion, Prompt, SamplingParams
from rollout.native.sampler import mix64
from rollout.vllm_backend.tiles import TileFacts, tile_items, tile_ranges

if TYPE_CHECKING:
    import vllm
    from vllm.inputs import EngineInput

TEMPERATURES = (0.01, 2.0)
"""vLLM raises lower temperatures to the first and refuses higher ones than the second."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Model properties that requests and outputs depend on."""

    end_token_ids: tuple[int, ...]
    """Tokens that end a completion."""
    banned_token_ids: tuple[int, ...]
    """Never sampled."""
    image_token_id: int | None
    """Placeholder of a visual token; None for a text model."""
    merge_size: int = 1
    """Patches per visual token along one side."""
    tiles: TileFacts | None = None
    """None for a text model, or one whose pictures are patches with grids."""


def sampling_params(sampling: SamplingParams, group_size: int, facts: ModelFacts) -> vllm.SamplingParams:
    """Return all vLLM settings for a group: an omitted one would come from the model folder.

    For n > 1, vLLM draws completion i from the stream of seed + i; group seeds are scattered first,
    so that neighbouring groups share no stream. Greedy completions of a group are identical, so
    only one is requested.

    Raises:
        ValueError: for settings that vLLM does not support.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind

    low, high = TEMPERATURES
    if not (sampling.greedy or low <= sampling.temperature <= high):
        raise ValueError(
            f"Invalid temperature={sampling.temperature} with rollout=vllm; expected 0 (greedy) or {low} to {high}"
        )
    scattered = int(mix64(torch.tensor(sampling.seed, dtype=torch.int64))) & (2**62 - 1)
    return vllm.SamplingParams(
        n=1 if sampling.greedy else group_size,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        seed=scattered,
        max_tokens=sampling.max_tokens,
        min_tokens=0,
        stop=list(sampling.stop),
        include_stop_str_in_output=True,
        # we name the end tokens: the tokenizer's own need not be one of the model's
        ignore_eos=True,
        stop_token_ids=list(facts.end_token_ids),
        # -inf, not the public interface's -100: excludes the tokens from the distribution entirely
        logit_bias=dict.fromkeys(facts.banned_token_ids, float("-inf")) or None,
        bad_words=None,
        allowed_token_ids=None,
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        prompt_logprobs=None,
        detokenize=bool(sampling.stop),
        skip_special_tokens=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def engine_input(prompt: Prompt, facts: ModelFacts, epoch: int) -> EngineInput:
    """Build what vLLM's processors would pass to its core, from the learner's ids and pixels.

    Nothing is tokenized, expanded or resized again. vLLM's cache keys for the prompt (keys and
    values, visual embeddings) contain `epoch`, so it never reuses results of other weights.

    Args:
        prompt: with the model's image inputs, or none.
        facts: model properties.
        epoch: number of the weights.

    Raises:
        ValueError: if the image placeholders do not match the images.
    """
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    token_ids, salt = prompt.token_ids.tolist(), f"weights-{epoch}"
    if not prompt.image_inputs:
        return tokens_input(token_ids, cache_salt=salt)
    if facts.tiles is not None:
        content = _digest(*(torch.as_tensor(value) for _, value in sorted(prompt.image_inputs.items())))
        ranges = tile_ranges(prompt, facts.tiles)
        names = [f"{salt}-{number}-{content}" for number in range(len(ranges))]
        items = tile_items(prompt, facts.tiles)
        return mm_input(token_ids, items, {"image": names}, {"image": ranges}, cache_salt=salt)
    grids = torch.as_tensor(prompt.image_inputs["image_grid_thw"])
    pixels = torch.as_tensor(prompt.image_inputs["pixel_values"])
    patches = grids.prod(dim=1)
    items = MultiModalKwargsItems.from_hf_inputs(
        {"pixel_values": pixels, "image_grid_thw": grids},
        {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", patches),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        },
    )
    pieces = zip(pixels.split(patches.tolist()), grids, strict=True)
    return mm_input(
        token_ids,
        items,
        {"image": [f"{salt}-{_digest(piece, grid)}" for piece, grid in pieces]},
        {"image": [PlaceholderRange(offset=start, length=length) for start, length in image_spans(prompt, facts)]},
        cache_salt=salt,
    )


def image_spans(prompt: Prompt, facts: ModelFacts) -> list[tuple[int, int]]:
    """Return (first position, length) of each image's placeholders in a prompt's ids.

    Raises:
        ValueError: if they do not match the images.
    """
    (indices,) = np.nonzero(prompt.token_ids == facts.image_token_id)
    grids = prompt.image_inputs.get("image_grid_thw", np.zeros((0, 3), dtype=np.int64))
    lengths = (grids.prod(axis=1) // facts.merge_size**2).tolist()
    if len(indices) == sum(lengths):
        pieces = np.split(indices, np.cumsum(lengths)[:-1]) if lengths else []
        if all(piece[-1] - piece[0] == len(piece) - 1 for piece in pieces):
            return [(int(piece[0]), len(piece)) for piece in pieces]
    raise ValueError(
        f"prompt {prompt.example.id!r} has {len(indices)} image placeholders, but its images need {lengths}, each contiguous: "
        "render it with this model's processor"
    )


def completion_of(output: vllm.CompletionOutput, text: str, min_version: int) -> Completion:
    """Convert a finished vLLM output to a `Completion`.

    Args:
        output: vLLM's output.
        text: decoded text of its tokens.
        min_version: policy version when its prompt was started.

    Raises:
        RuntimeError: if vLLM ended it for any reason but stop or length.
    """
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(
            f"vLLM ended a completion with {output.finish_reason!r} after {len(output.token_ids)} tokens"
        )
    # FlatLogprobs: one entry per token, since only the sampled one was requested
    logprobs: Any = output.logprobs
    assert list(logprobs.token_ids) == list(output.token_ids)
    assert output.weight_versions
    return Completion(
        token_ids=np.asarray(output.token_ids, dtype=np.int64),
        rollout_logprobs=np.asarray(logprobs.logprobs, dtype=np.float32),
        text=text,
        finish_reason=output.finish_reason,
        min_version=min_version,
        max_version=int(output.weight_versions[-1].version),
    )


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Cut the text after the first stop string."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _digest(*tensors: torch.Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.contiguous().numpy().data)
    return content.hexdigest()
