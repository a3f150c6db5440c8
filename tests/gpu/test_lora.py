"""Adapters on a GPU: merged weights in the kernels' decoder, and weights in 4 bits below them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from learner.learner import PolicyLearner
from rlmed.models.adapters import add_adapters
from rlmed.models.policy import load_policy
from tests.configs import learner_config, lora_config, loss_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ALL = ("vision", "merger", "language_model")


def trained(policy, groups):
    learner = PolicyLearner(
        policy,
        None,
        loss_config(kl_coef=0.04),
        learner_config(lr=1e-2, lr_schedule="constant"),
        total_steps=3,
        max_tokens=32,
        temperature=1.0,
    )
    return learner, learner.step(groups)


def test_an_engine_on_merged_weights_agrees_with_the_learner(tiny_folder, make_train_groups):
    pytest.importorskip("peft", reason="needs the extra lora")
    sampling = load_policy(tiny_folder("qwen2_vl"), dtype="bfloat16", device="cuda")
    before = {name: value.clone() for name, value in sampling.model.named_parameters()}
    policy = add_adapters(sampling, lora_config(rank=4, target=ALL), base="x", seed=0)
    policy.adapters.give_to(sampling)
    learner, _ = trained(policy, make_train_groups("qwen2_vl", 4))
    policy.publish()
    found = dict(sampling.model.named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in learner.full_weights(on_device=True))
    assert all(torch.equal(weight.value, before[weight.name]) for weight in policy.weights())


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra qlora")
def test_weights_in_four_bits(tiny_folder, make_train_groups):
    pytest.importorskip("peft", reason="needs the extra lora")
    folder = tiny_folder("qwen2_vl")
    loaded = load_policy(folder, dtype="bfloat16", device="cuda", quantize=("language_model",))
    policy = add_adapters(loaded, lora_config(rank=4, quantize="nf4"), base="x", seed=0)
    plain = {name: tuple(value.shape) for name, value in load_policy(folder, dtype="bfloat16").model.named_parameters()}
    before = {weight.name: weight.value.clone() for weight in policy.weights()}
    assert {name: tuple(value.shape) for name, value in before.items()} == plain
    learner, metrics = trained(policy, make_train_groups("qwen2_vl", 4))
    assert metrics["skipped_steps"] == 0
    assert all(torch.equal(weight.value, before[weight.name]) for weight in policy.weights())
    merged = dict(learner.full_weights(on_device=True))
    assert merged.keys() == plain.keys()
    assert any(not torch.equal(value, before[name]) for name, value in merged.items())
