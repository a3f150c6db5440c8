"""The packed computation against a padded transformers computation: log-probabilities and every parameter's gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.packing import PackItem, TrainSequence, pack, packed_logprobs

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen2", "qwen3", "llama")
GRIDS = ((8, 8), None, (4, 6), None, (2, 10))
TOLERANCE = 1e-5


def ragged_groups(family, group_size, make_prompt, make_group):
    """Groups with and without image, whose completions have 1 to 28 tokens; one group has one-token completions only."""
    groups = []
    for i, grid in enumerate(GRIDS):
        prompt = make_prompt(family, 50 + i, length=4 + 9 * i, grid=grid if "vl" in family else None)
        lengths = np.random.default_rng(i).integers(1, 29, group_size).tolist()
        lengths[0] = 1 if i % 2 else lengths[0]
        groups.append(make_group(prompt, [1] * group_size if i == 3 else lengths, seed=i))
    return groups


def packed_items(groups):
    return [PackItem(group.prompt, tuple(TrainSequence(c, 1.0) for c in group.completions)) for group in groups]


def padded_rows(groups):
    return [(group.prompt, completion.token_ids) for group in groups for completion in group.completions]


def gradients(model, loss):
    """Float64 gradients by parameter name; a parameter that the loss does not touch fails the test."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def worst_relative(actual, expected):
    """Largest difference of a gradient, relative to the largest entry of its parameter's gradient; and where it is."""
    assert actual.keys() == expected.keys()
    return max(
        (float((actual[name] - grad).abs().max() / grad.abs().max()), name)
        for name, grad in expected.items()
    )


@pytest.mark.parametrize("group_size", [1, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_those_of_the_padded_computation(
    family, group_size, tiny_policy, transformers_model, make_prompt, make_group, padded_logprobs, record_property
):
    groups = ragged_groups(family, group_size, make_prompt, make_group)
    policy, model = tiny_policy(family), transformers_model(family)
    logprobs, _ = packed_logprobs(policy, pack(packed_items(groups), policy), 1.0)
    expected = torch.cat(padded_logprobs(model, padded_rows(groups)))
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(0)) / len(expected)
    record_property("logprobs", float((logprobs - expected).abs().max()))
    worst = worst_relative(gradients(policy.model, (logprobs * weights).sum()), gradients(model, (expected * weights).sum()))
    record_property("gradients", worst)
    assert worst[0] <= TOLERANCE
    torch.testing.assert_close(logprobs, expected, atol=TOLERANCE, rtol=TOLERANCE)
