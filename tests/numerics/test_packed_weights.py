"""Decoding with packed weights that may change in mid-completion: none is computed stale."""

from __future__ import annotations

import pytest
import torch

from rlmed.core.config.checks import PRODUCT_USES
from rlmed.core.types import RolloutRequest, SamplingParams
from rlmed.models.cpu import products
from rlmed.models.cpu.compiler import missing_library
from rlmed.models.weights import make_buckets
from rollout.native.engine import NativeEngine

COMPILED = ("compiled",)
STEPS = 4
"""Tokens before the change and after it."""

pytestmark = pytest.mark.skipif(not products.has_onednn(), reason="this torch has no oneDNN")


def fused_step(engine):
    parameters = list(engine.policy.model.parameters())
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    torch.optim.AdamW(parameters, lr=0.02, fused=True).step()


def loaded(engine):
    generator = torch.Generator().manual_seed(1)
    tensors = [
        (name, parameter.detach() + 0.02 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in engine.policy.model.named_parameters()
    ]
    engine.update_weights(1, list(make_buckets(tensors)))


def state_dict_loaded(engine):
    generator = torch.Generator().manual_seed(1)
    state = engine.policy.model.state_dict()
    engine.policy.model.load_state_dict(
        {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    )


def replaced(engine):
    """Other parameters in the modules."""
    generator = torch.Generator().manual_seed(1)
    state = engine.policy.model.state_dict()
    engine.policy.model.load_state_dict(
        {name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()},
        assign=True,
    )


def norms_moved(engine):
    """Other memory, for norms alone."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in engine.policy.model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)


def unchanged(engine):
    pass


def completions(policy, prompts, change, uses, monkeypatch):
    """Tokens and log-probabilities of an engine whose weights change after `STEPS` tokens each."""
    monkeypatch.setattr(products._Choice, "uses", frozenset(uses))
    engine = NativeEngine(policy, lambda _: "")
    policy.end_token_ids = frozenset()
    for i, prompt in enumerate(prompts):
        engine.submit(RolloutRequest(i, prompt, 3, SamplingParams(seed=i, max_tokens=2 * STEPS)))
    for _ in range(STEPS):
        engine.step()
    assert len(engine._packs) > 10 or "packed_weights" not in uses
    compiled = policy.decode_kernels().compiled
    assert len(engine._packs) == 2 or not compiled
    change(engine)
    groups = []
    while engine.busy:
        groups += engine.step()
    assert len(engine._packs) == 0  # memory goes back to the learner
    done = [each for group in sorted(groups, key=lambda group: group.request.index) for each in group.completions]
    return (
        torch.stack([torch.as_tensor(each.token_ids) for each in done]),
        torch.stack([torch.as_tensor(each.rollout_logprobs) for each in done]),
    )


CHANGES = (unchanged, fused_step, loaded, state_dict_loaded, replaced, norms_moved)


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
@pytest.mark.parametrize("uses", [("packed_weights",), PRODUCT_USES, COMPILED], ids=["alone", "all", "compiled"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_a_change_of_weights_is_seen_by_the_next_token(change, family, uses, fresh_policy, mixed_prompts, monkeypatch):
    prompts = mixed_prompts(family, 3)
    if uses == COMPILED and (reason := missing_library()):
        pytest.skip(reason)
    plain = completions(fresh_policy(family, compiled_decode=False), prompts, change, (), monkeypatch)
    packed = completions(fresh_policy(family, compiled_decode=uses == COMPILED), prompts, change, uses, monkeypatch)
    assert torch.equal(plain[0], packed[0])
    # sums of some hundred float32 products in each of a few layers: far below what a stale weight
    # makes
    torch.testing.assert_close(packed[1], plain[1], atol=1e-4, rtol=0)
    if change is not unchanged:
        still = completions(fresh_policy(family, compiled_decode=False), prompts, unchanged, (), monkeypatch)
        assert torch.equal(still[1][:, :STEPS], plain[1][:, :STEPS])
        assert float((still[1][:, STEPS] - plain[1][:, STEPS]).abs().max()) > 1e-2
