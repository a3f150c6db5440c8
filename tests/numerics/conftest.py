"""The slow reference: transformers on a padded batch where every completion repeats its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from rlmed.core.types import IntArray, Prompt, RolloutGroup, RolloutRequest, SamplingParams
from rlmed.models.families import family_of, unsampleable_token_ids
from rlmed.models.policy import Policy
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from tests.tiny_vision import TILE_FAMILIES, padded_images


def _padded_inputs(model: PreTrainedModel, rows: Sequence[tuple[Prompt, IntArray]], side: str) -> dict[str, Tensor]:
    """Forward arguments of a batch of (prompt, completion tokens), left- or right-padded."""
    texts = [np.concatenate([prompt.token_ids, tokens]) for prompt, tokens in rows]
    width = max(map(len, texts))
    token_ids = torch.full((len(rows), width), model.generation_config.pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, text in enumerate(texts):
        span = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        token_ids[i, span], mask[i, span] = torch.from_numpy(text), 1
    inputs = {"input_ids": token_ids, "attention_mask": mask}
    family = model.config.model_type
    if family_of(model.config).position_rows == 1:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if not family_of(model.config).vision:
        return inputs
    if family in TILE_FAMILIES:
        prompts = [prompt for prompt, _ in rows]
        return inputs | padded_images(family, prompts, token_ids, model.config.image_token_id)
    inputs["mm_token_type_ids"] = (token_ids == model.config.image_token_id).int()
    for name in ("pixel_values", "image_grid_thw"):
        arrays = [prompt.image_inputs[name] for prompt, _ in rows if prompt.image_inputs]
        if arrays:
            inputs[name] = torch.from_numpy(np.concatenate(arrays))
    return inputs


def _padded_logprobs(
    model: PreTrainedModel,
    rows: Sequence[tuple[Prompt, IntArray]],
    *,
    temperature: float = 1.0,
    warpers: LogitsProcessorList | None = None,
    side: str = "right",
) -> list[Tensor]:
    """The log-probability of each completion's tokens [T], no vision tokens; differentiable."""
    logits = model(**_padded_inputs(model, rows, side)).logits
    logits = logits.index_fill(2, torch.tensor(unsampleable_token_ids(model.config), dtype=torch.int64), -torch.inf)
    result = []
    for i, (prompt, tokens) in enumerate(rows):
        length = len(prompt.token_ids) + len(tokens)
        start = len(prompt.token_ids) - 1 + (logits.shape[1] - length if side == "left" else 0)
        scores = logits[i, start : start + len(tokens)] / temperature
        if warpers is not None:
            scores = warpers(None, scores)
        result.append(scores.log_softmax(-1).gather(1, torch.from_numpy(tokens)[:, None])[:, 0])
    return result


def _run_engine(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    group_size: int = 1,
    limits: EngineLimits | None = None,
    order: Sequence[int] | None = None,
    **sampling: float,
) -> list[RolloutGroup]:
    """The groups of all prompts, in order; a prompt's seed is its index in any submission order."""
    engine = NativeEngine(policy, lambda _: "", limits)
    settings = {"max_tokens": 24, **sampling}
    for i in order if order is not None else range(len(prompts)):
        engine.submit(RolloutRequest(i, prompts[i], group_size, SamplingParams(seed=i, **settings)))  # type: ignore[arg-type]
    groups: list[RolloutGroup] = []
    while engine.busy:
        groups += engine.step()
    return sorted(groups, key=lambda group: group.request.index)


@pytest.fixture(scope="session")
def padded_inputs() -> Callable[..., dict[str, Tensor]]:
    """See `_padded_inputs`."""
    return _padded_inputs


@pytest.fixture(scope="session")
def padded_logprobs() -> Callable[..., list[Tensor]]:
    """See `_padded_logprobs`."""
    return _padded_logprobs


@pytest.fixture(scope="session")
def run_engine() -> Callable[..., list[RolloutGroup]]:
    """See `_run_engine`."""
    return _run_engine


def _is_rounding(name: str, gradients: Mapping[str, Tensor]) -> bool:
    """Whether a gradient is nothing but rounding.

    A bias of keys that are not rotated moves all scores of a query alike, which changes no weight.
    """
    query = name.replace("k_proj.bias", "q_proj.bias")
    return query != name and bool(gradients[name].abs().max() < 1e-4 * gradients[query].abs().max())


@pytest.fixture(scope="session")
def worst_relative() -> Callable[[Mapping[str, Tensor | None], Mapping[str, Tensor | None]], tuple[float, str]]:
    """Largest gradient difference, relative to its parameter's largest entry, and its place."""

    def compute(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> tuple[float, str]:
        # None: a tower's last norm, say, where a model reads an earlier layer
        actual, expected = (
            {name: gradient for name, gradient in gradients.items() if gradient is not None}
            for gradients in (actual, expected)
        )
        assert actual.keys() == expected.keys()
        # a parameter that the loss does not reach would show nothing
        assert all(gradient.any() for gradient in expected.values())
        compared = {name for name in expected if not _is_rounding(name, expected)}
        assert compared == {name for name in actual if not _is_rounding(name, actual)}
        return max(
            (float((actual[name] - expected[name]).abs().max() / expected[name].abs().max()), name) for name in compared
        )

    return compute
