"""Packed against padded transformers computation: log-probabilities, every parameter's gradient."""

from __future__ import annotations

import pytest
import torch

from learner.packing import PackItem, TrainSequence, pack, packed_logprobs
from tests.rounding import GRADIENTS, LOGPROBS
from tests.tiny_vision import TILE_FAMILIES

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", *TILE_FAMILIES, "qwen2", "qwen3", "llama", "gemma3_text")


def packed_items(groups):
    return [PackItem(group.prompt, tuple(TrainSequence(c, 1.0) for c in group.completions)) for group in groups]


def padded_rows(groups):
    return [(group.prompt, completion.token_ids) for group in groups for completion in group.completions]


def gradients(model, loss):
    """Gradients by parameter name."""
    model.zero_grad()
    loss.backward()
    result = {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return result


@pytest.mark.parametrize("group_size", [1, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_those_of_the_padded_computation(
    family,
    group_size,
    tiny_policy,
    transformers_model,
    make_train_groups,
    padded_logprobs,
    worst_relative,
    record_property,
):
    groups = [group.rollout for group in make_train_groups(family, group_size)]
    assert {len(completion.token_ids) for group in groups for completion in group.completions} > {1}
    policy, model = tiny_policy(family), transformers_model(family)
    logprobs, _ = packed_logprobs(policy, pack(packed_items(groups), policy), 1.0)
    expected = torch.cat(padded_logprobs(model, padded_rows(groups)))
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(0)) / len(expected)
    record_property("logprobs", float((logprobs - expected).detach().abs().max()))
    worst = worst_relative(
        gradients(policy.model, (logprobs * weights).sum()), gradients(model, (expected * weights).sum())
    )
    record_property("gradients", worst)
    assert worst[0] <= GRADIENTS
    torch.testing.assert_close(logprobs, expected, atol=LOGPROBS, rtol=0)
