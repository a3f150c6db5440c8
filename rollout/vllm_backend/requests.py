"""Requests and outputs in vLLM's terms and back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlmed.core.types import Completion, Prompt, SamplingParams
from rollout.native.sampler import mix64

if TYPE_CHECKING:
    import vllm
    from vllm.inputs import EngineInput

TEMPERATURES = (0.01, 2.0)
"""vLLM takes lower ones for the first and refuses higher ones."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What requests and outputs need to know of a model."""

    end_token_ids: tuple[int, ...]
    """Each of them ends a completion."""
    banned_token_ids: tuple[int, ...]
    """Never sampled."""
    image_token_id: int | None
    """The placeholder of a visual token; None for a text model."""
    merge_size: int = 1
    """Patches of an image that make one visual token, a side."""


def sampling_params(sampling: SamplingParams, group_size: int, facts: ModelFacts) -> vllm.SamplingParams:
    """vLLM's settings for a group, all of them: one left out would come from the model folder.

    Completion i draws from the stream of seed + i, which vLLM makes for n > 1; seeds of groups are scattered first, so that
    neighbouring ones share no stream. Greedy completions of a group are all the same: one is asked for.

    Raises:
        ValueError: for settings that vLLM cannot sample with.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind

    low, high = TEMPERATURES
    if not (sampling.greedy or low <= sampling.temperature <= high):
        raise ValueError(
            f"temperature={sampling.temperature} is not possible with rollout=vllm: use 0 (greedy) or {low} to {high}"
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
        # the end tokens are ours to name: the tokenizer's own need not be among the model's
        ignore_eos=True,
        stop_token_ids=list(facts.end_token_ids),
        # minus infinity, not the -100 of the public interface: the tokens are out of the distribution altogether
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
    """A prompt as vLLM's own processors would hand it to its core: the ids and the pixels that the learner sees.

    Nothing is tokenized, expanded or resized again. Whatever vLLM keeps of the prompt (keys and values, visual embeddings) is
    kept under a name that has `epoch` in it, so that nothing computed with other weights is found again.

    Args:
        prompt: with image inputs of the Qwen2-VL kind, or none.
        facts: of the model.
        epoch: number of the weights.

    Raises:
        ValueError: when the image placeholders do not fit the images.
    """
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    token_ids, salt = prompt.token_ids.tolist(), f"weights-{epoch}"
    if not prompt.image_inputs:
        return tokens_input(token_ids, cache_salt=salt)
    grids = torch.as_tensor(prompt.image_inputs["image_grid_thw"])
    pixels = torch.as_tensor(prompt.image_inputs["pixel_values"])
    patches = grids.prod(dim=1)
    items = MultiModalKwargsItems.from_hf_inputs(
        {"pixel_values": pixels, "image_grid_thw": grids},  # type: ignore[arg-type]  # any mapping does
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
    """(first position, length) of each image's placeholders in a prompt's ids.

    Raises:
        ValueError: when they do not fit the images.
    """
    (places,) = np.nonzero(prompt.token_ids == facts.image_token_id)
    grids = prompt.image_inputs.get("image_grid_thw", np.zeros((0, 3), dtype=np.int64))
    lengths = (grids.prod(axis=1) // facts.merge_size**2).tolist()
    if len(places) == sum(lengths):
        pieces = np.split(places, np.cumsum(lengths)[:-1]) if lengths else []
        if all(piece[-1] - piece[0] == len(piece) - 1 for piece in pieces):
            return [(int(piece[0]), len(piece)) for piece in pieces]
    raise ValueError(
        f"prompt {prompt.example.id!r} has {len(places)} image placeholders, its images need {lengths}, each in one piece: "
        "render it with the processor of this model"
    )


def completion_of(output: vllm.CompletionOutput, text: str, min_version: int) -> Completion:
    """A finished completion.

    Args:
        output: of vLLM.
        text: of its tokens.
        min_version: of the weights under which its prompt was started.

    Raises:
        RuntimeError: when vLLM has ended it for a reason of its own.
    """
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(
            f"vLLM has ended a completion with {output.finish_reason!r} after {len(output.token_ids)} tokens"
        )
    logprobs: Any = output.logprobs  # FlatLogprobs: one entry a token, since none but the sampled one was asked for
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
    """The text up to and including the first stop string."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _digest(pixels: torch.Tensor, grid: torch.Tensor) -> str:
    content = hashlib.sha256(pixels.contiguous().numpy())
    content.update(grid.contiguous().numpy())
    return content.hexdigest()
