"""Packed against padded transformers computation: log-probabilities, every parameter's gradient.

In float32, as training computes, they differ by what a processor's order of adding does
(`tests/rounding.py`): by 6e-6 in log-probability with AVX2, by 2e-5 without. That packing itself
changes nothing is asserted in float64, where orders of adding leave nothing to see.
"""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from learner.packing import PackItem, TrainSequence, pack, packed_logprobs
from tests.rounding import LOGPROBS, gradient_bound
from tests.tiny_vision import TILE_FAMILIES

EXACT = 1e-9
"""In float64, whose rounding is 5e8 times finer: 1e-4 in float32 is 2e-13 there."""
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
    assert worst[0] <= gradient_bound(family)
    torch.testing.assert_close(logprobs, expected, atol=LOGPROBS, rtol=0)


class InFloat64(TorchFunctionMode):
    """Computes in float64 where transformers asks for float32: in norms, rotation, softmax."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wider(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_changes_no_number(
    family, fresh_policy, transformers_model, make_train_groups, padded_logprobs, worst_relative, record_property
):
    """Against each completion alone; projection and softmax of the learner have their own tests."""
    groups = [group.rollout for group in make_train_groups(family, 3)]
    policy, model = fresh_policy(family), transformers_model(family).double()
    policy.model.double()
    batch = pack(packed_items(groups), policy)
    images = {
        name: value.double() if value.is_floating_point() else value for name, value in batch.image_inputs.items()
    }
    with InFloat64():
        hidden = policy.hidden(batch.token_ids, batch.positions, batch.layout, images)
        logits = policy.projection(hidden[batch.predictors])
        logits = logits.index_fill(1, torch.tensor(policy.banned_token_ids, dtype=torch.int64), -torch.inf)
        logprobs = logits.log_softmax(1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        expected = torch.cat([padded_logprobs(model, [row])[0] for row in padded_rows(groups)])
        assert logprobs.dtype == expected.dtype == torch.float64
        weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(0)).double() / len(expected)
        worst = worst_relative(
            gradients(policy.model, (logprobs * weights).sum()), gradients(model, (expected * weights).sum())
        )
    record_property("logprobs", float((logprobs - expected).detach().abs().max()))
    record_property("gradients", worst)
    torch.testing.assert_close(logprobs, expected, atol=EXACT, rtol=0)
    assert worst[0] <= EXACT
