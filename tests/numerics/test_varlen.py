"""Unpadded shared-prefix attention against definition, gradients too; why backward is explicit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from learner.packing import PackItem, TrainSequence, pack, packed_logprobs
from rlmed.models import policy as policy_module
from rlmed.models.varlen import AttentionChoice, VarlenLayout
from rlmed.models.varlen_backends import Reference, Row
from tests.dense_attention import allowed, dense_attention, row_tensors
from tests.rounding import GRADIENTS, LOGPROBS, worst_difference

WIDTH, SCALE = 5, 0.6
EXACT = 1e-10
"""In float64: a thousand times the rounding of sums over 100 tokens; any other fault is larger."""
HALF_UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Largest relative error of rounding to the dtype."""
GROUPS = st.lists(st.tuples(st.integers(1, 7), st.lists(st.integers(0, 6), max_size=5)), min_size=1, max_size=5)
HEADS = st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)])
RAGGED = [(3, (4, 1, 2)), (1, ()), (6, (0, 5)), (2, (0,)), (4, (3,))]
"""Unequal prompts, G = 1, empty completions, and prompts without any."""


def gradients(output, tensors):
    """Of a weighted sum of the output."""
    # exact in every dtype
    weights = torch.randint(-4, 5, output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output.double() * weights).sum(), tensors)


def both(groups, heads=(4, 2), dtype=torch.float64):
    """[output, dq, dk, dv] of the layout, and of dense attention in float64 on the same numbers."""
    tensors = row_tensors(groups, *heads, WIDTH, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = VarlenLayout.build(groups, Reference()).attend(0, *tensors, SCALE)
    expected = dense_attention(*exact, allowed(groups), SCALE)
    return [output, *gradients(output, tensors)], [expected, *gradients(expected, exact)]


@settings(deadline=None, max_examples=60)
@given(GROUPS, HEADS)
@example(RAGGED, (4, 2))
@example([(5, ()), (2, ()), (7, ())], (4, 2))
@example([(40, (17,))], (6, 2))
def test_output_and_gradients_are_those_of_dense_attention(groups, heads):
    for found, right in zip(*both(groups, heads), strict=True):
        torch.testing.assert_close(found, right, atol=EXACT, rtol=0)


@pytest.mark.parametrize("dtype", HALF_UNIT)
@pytest.mark.parametrize("groups", [RAGGED, [(150, (40, 70, 12))]], ids=["ragged", "long"])
def test_half_precision_costs_a_few_roundings(groups, dtype, record_property):
    # an output is rounded in both parts and merged; a gradient in both and their sum, and it
    # contains grad·output, whose output is rounded. Six roundings, independent, each with a root
    # mean square of 0.4 half units on average: about one half unit. Short sums leave more to
    # chance, and ds is a difference: three
    for name, found, right in zip(["output", "dq", "dk", "dv"], *both(groups, dtype=dtype), strict=True):
        error = (found.double() - right).detach()
        right = right.detach()
        relative, mean = float(error.norm() / right.norm()), float(error.abs().mean() / right.abs().max())
        record_property(name, (relative, mean))
        assert HALF_UNIT[dtype] / 10 < relative < 3 * HALF_UNIT[dtype]
        assert mean < 1e-3


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3", "llama"])
def test_a_model_gives_the_logprobs_and_gradients_of_the_padded_layout(
    family, tiny_policy, make_train_groups, worst_relative
):
    policy = tiny_policy(family)
    groups = [group.rollout for group in make_train_groups(family, 4)]
    items = [PackItem(group.prompt, tuple(TrainSequence(c, 1.0) for c in group.completions)) for group in groups]
    shapes = [
        (len(group.prompt.token_ids), [len(completion.token_ids) - 1 for completion in group.completions])
        for group in groups
    ]
    batch = pack(items, policy)
    results = []
    for layout in (batch.layout, VarlenLayout.build(shapes, Reference())):
        policy.model.zero_grad()
        logprobs, _ = packed_logprobs(policy, replace(batch, layout=layout), 1.0)
        logprobs.mean().backward()
        results.append((logprobs, {name: weight.grad.clone() for name, weight in policy.model.named_parameters()}))
    policy.model.zero_grad()
    (expected, expected_gradients), (found, found_gradients) = results
    torch.testing.assert_close(found, expected, atol=LOGPROBS, rtol=0)
    assert worst_relative(found_gradients, expected_gradients)[0] <= GRADIENTS


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_prompts_without_padding_give_the_engine_the_same_rollouts(
    family, tiny_policy, mixed_prompts, run_engine, monkeypatch
):
    policy, prompts = tiny_policy(family), mixed_prompts(family, 5)
    expected = run_engine(policy, prompts, group_size=3)
    backend = Reference()
    monkeypatch.setattr(policy_module, "choose_attention", lambda *_: AttentionChoice(backend, "installed"))
    assert isinstance(policy.packed_layout([(3, ())]), VarlenLayout)
    assert worst_difference(expected, run_engine(policy, prompts, group_size=3), policy) < LOGPROBS


class Kernel(torch.autograd.Function):
    """One attention as flash kernels offer it to autograd, without the log-sum-exp's gradient."""

    @staticmethod
    def forward(ctx, query, key, value, spans, keep):
        output, logsumexp = Reference().forward(Row(query, key, value), spans, SCALE)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.spans, ctx.keep = spans, keep
        return output, logsumexp

    @staticmethod
    def backward(ctx, grad, grad_logsumexp):
        query, key, value, output, logsumexp = ctx.saved_tensors
        shares = Reference().backward(grad, Row(query, key, value), output, logsumexp, ctx.spans, SCALE)
        if ctx.keep:
            with torch.enable_grad():
                inputs = [tensor.detach().requires_grad_() for tensor in (query, key)]
                _, again = Reference().forward(Row(*inputs, value), ctx.spans, SCALE)
                more = torch.autograd.grad(again, inputs, grad_logsumexp)
            shares = shares[0] + more[0], shares[1] + more[1], shares[2]
        return *shares, None, None


def merged_by_autograd(query, key, value, layout, *, keep):
    """The same sum of two attentions, left to autograd."""
    rows, prompt = layout.suffixes.completion_tokens, layout.suffixes.prompt_tokens
    output, logsumexp = Kernel.apply(query, key, value, layout.segments, keep)
    far, far_logsumexp = Kernel.apply(query[rows], key[prompt], value[prompt], layout.suffixes.spans, keep)
    share = torch.sigmoid(far_logsumexp - logsumexp[:, rows]).T.unsqueeze(-1)
    return output.index_copy(0, rows, torch.lerp(output[rows], far, share))


def test_merging_under_autograd_gives_wrong_gradients_unless_the_kernels_keep_the_logsumexps():
    tensors = row_tensors(RAGGED, 4, 2, WIDTH)
    layout = VarlenLayout.build(RAGGED, Reference())
    right = gradients(dense_attention(*tensors, allowed(RAGGED), SCALE), tensors)
    dropped, kept = (merged_by_autograd(*tensors, layout, keep=keep) for keep in (False, True))
    torch.testing.assert_close(dropped, kept)
    wrong = gradients(dropped, tensors)
    assert float((wrong[0] - right[0]).norm() / right[0].norm()) > 0.1
    assert float((wrong[1] - right[1]).norm() / right[1].norm()) > 0.1
    for found, expected in zip(gradients(kept, tensors), right, strict=True):
        torch.testing.assert_close(found, expected, atol=EXACT, rtol=0)
