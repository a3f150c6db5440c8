"""Adapters: a padded peft model's gradients, an untouched base, merged weights, resuming."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learner.advantages import group_advantages
from learner.learner import PolicyLearner
from learner.packing import pack, packed_logprobs
from learner.supervised import SupervisedLearner, written_item
from rlmed.core.types import ScoredGroup, TrainGroup
from rlmed.models.adapters import add_adapters
from rlmed.models.families import PARTS
from rlmed.models.merging import merge
from rlmed.models.policy import load_policy
from rlmed.models.weights import make_buckets
from rollout.native.engine import NativeEngine
from tests.configs import learner_config, lora_config, loss_config
from tests.numerics.test_packed_parity import FAMILIES
from tests.padded_grpo import padded_loss
from tests.rounding import LOGPROBS, gradient_bound, rounding

peft = pytest.importorskip("peft", reason="needs the extra lora")

ALL = ("vision", "merger", "language_model")
TEMPERATURE = 0.9


SMALL = {"rank": 4, "alpha": 8.0}


def adapted(sampling, seed=0, **changes):
    """The policy with adapters, whose B are not zero, so that they have a say."""
    policy = add_adapters(sampling, lora_config(**SMALL, **changes), base=str(sampling.model.name_or_path), seed=seed)
    randomize(policy, seed=seed)
    return policy


def randomize(policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.adapters.parameters().items():
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def new_learner(policy, loss=None, **config):
    return PolicyLearner(
        policy,
        None,
        loss or loss_config(kl_coef=0.0),
        learner_config(**{"lr": 1e-3, "lr_schedule": "constant", **config}),
        total_steps=10,
        max_tokens=32,
        temperature=TEMPERATURE,
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def factors(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.adapters.parameters().items()}


def identical(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_a_padded_peft_model(
    family, tiny_folder, fresh_policy, make_train_groups, transformers_model, padded_logprobs, worst_relative, tmp_path
):
    """GRPO with the k3 penalty, whose reference is peft's model with its adapters off."""
    policy = adapted(fresh_policy(family), target=ALL)
    groups = make_train_groups(family, 4)
    policy.adapters.config.base_model_name_or_path = str(tiny_folder(family))
    learner = new_learner(policy, loss_config(kl_coef=0.04))
    learner.save(tmp_path)()
    model = peft.PeftModel.from_pretrained(transformers_model(family), tmp_path, is_trainable=True)

    rows = [(group.rollout.prompt, entry.token_ids) for group in groups for entry in group.rollout.completions]
    advantages = [advantage for group in groups for advantage in group.advantages.tolist()]
    with model.disable_adapter(), torch.no_grad():
        references = padded_logprobs(model, rows, temperature=TEMPERATURE)
    loss = padded_loss(padded_logprobs(model, rows, temperature=TEMPERATURE), references, advantages)
    loss.backward()
    prefix = "base_model.model."
    expected = {name.removeprefix(prefix): p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = {}
    learner.optimizer.step = lambda: found.update({n: p.grad for n, p in policy.adapters.parameters().items()}) or 1.0
    metrics = learner.step(groups)
    worst = worst_relative(found, expected)
    assert worst[0] <= gradient_bound(family), worst
    assert metrics["loss"] == pytest.approx(loss.item(), abs=0.04 * 2 * LOGPROBS)
    assert metrics["kl"] > 1e-3
    assert all(p.grad is None for n, p in policy.model.named_parameters() if n not in found)


@pytest.mark.parametrize("target", [*((part,) for part in PARTS), ALL], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_moves_every_adapter_and_no_weight(target, dtype, fresh_policy, make_train_groups):
    sampling = fresh_policy("qwen2_vl", dtype=dtype)
    before = weights(sampling.model)
    policy = add_adapters(sampling, lora_config(**SMALL, target=target), base="x", seed=0)
    first = factors(policy)
    parts = {policy.family.part_of(name) for name in first}
    assert parts == set(target)
    learner = new_learner(policy, loss_config(kl_coef=0.04), weight_decay=0.1)
    for seed in range(3):
        learner.step(make_train_groups("qwen2_vl", 3, seed=seed))
    assert {name for name, value in factors(policy).items() if torch.equal(value, first[name])} == set()
    assert identical(weights(sampling.model), before)
    assert [pair.name for pair in learner.optimizer._pairs] == list(first)


def test_another_seed_draws_other_adapters(fresh_policy):
    policies = [add_adapters(fresh_policy("qwen2"), lora_config(**SMALL), base="x", seed=seed) for seed in (0, 0, 1)]
    own = [factors(policy) for policy in policies]
    assert identical(own[0], own[1])
    assert not identical(own[0], own[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_of_the_same_process_samples_from_merged_weights(
    family, fresh_policy, mixed_prompts, run_engine, make_train_groups
):
    """After a push its log-probabilities are the learner's; the base is still as loaded."""
    sampling = fresh_policy(family)
    before = weights(sampling.model)
    policy = adapted(sampling, target=ALL)
    policy.adapters.give_to(sampling)
    learner = new_learner(policy)
    learner.step(make_train_groups(family, 4))
    engine = NativeEngine(sampling, lambda _: "")

    class Pool:
        def update_weights(self, version):
            engine.update_weights(version)

    learner.push_weights(Pool())
    assert engine.policy_version == 1
    groups = run_engine(sampling, mixed_prompts(family, 6), group_size=4, temperature=TEMPERATURE)
    assert mismatch(policy, groups) <= 2 * LOGPROBS / TEMPERATURE
    plain = fresh_policy(family)
    assert mismatch(plain, groups) > 0.05  # the adapters have a say
    assert identical({weight.name: weight.value for weight in policy.weights()}, before)
    # no copy of a weight without an adapter
    merged = {name for name in before if own_storage(policy, sampling, name)}
    assert merged == {weight.name for weight in policy.weights() if weight.factors}


def own_storage(policy, sampling, name):
    base = {weight.name: weight.value for weight in policy.weights()}[name]
    return dict(sampling.model.named_parameters())[name].data_ptr() != base.data_ptr()


def mismatch(policy, groups):
    """The largest difference between the engine's log-probabilities and this policy's."""
    rewards = np.zeros(len(groups[0].completions), dtype=np.float32)
    batches = [TrainGroup(ScoredGroup(group, rewards, {}), rewards) for group in groups]
    learner = PolicyLearner(
        policy, None, loss_config(kl_coef=0.0), learner_config(), total_steps=1, max_tokens=32, temperature=TEMPERATURE
    )
    (share,) = learner.split(batches, 1)
    worst = 0.0
    with torch.no_grad():
        for part in share[0].micro_batches:
            batch = pack(part, policy)
            logprobs, _ = packed_logprobs(policy, batch, TEMPERATURE)
            worst = max(worst, float((logprobs - batch.rollout_logprobs).abs().max()))
    return worst


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_push_brings_merged_weights_under_their_plain_names(dtype, fresh_policy):
    sampling = fresh_policy("qwen2_vl", dtype=dtype)
    policy = adapted(sampling, target=ALL)
    policy.adapters.give_to(sampling)
    other = fresh_policy("qwen2_vl", dtype=dtype)
    engine = NativeEngine(other, lambda _: "")
    learner = new_learner(policy)
    engine.update_weights(1, list(make_buckets(learner.full_weights())))
    assert identical(weights(other.model), weights(sampling.model))
    assert {name: value.dtype for name, value in learner.full_weights()} == {
        name: value.dtype for name, value in weights(sampling.model).items()
    }


def test_merged_weights_of_low_precision_keep_small_changes():
    """Rounded to nearest, an adapter below half of the last bit would vanish."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator).bfloat16()
    b, a = torch.full((256, 1), 1e-2), torch.full((1, 256), 1e-2)
    change = merge("w", weight, (b, a), 1.0).float() - weight.float()
    assert (change == 0).float().mean() > 0.9  # 1e-4 is a small part of a last bit
    # the mean of 65,536 changes, each 0 or a bit (2^-8 of weights around 1), is off by
    # 2^-8 · √(1e-4 · 2^8) / 256
    assert change.mean() == pytest.approx(1e-4, abs=5 * 2**-8 * (1e-4 * 2**8) ** 0.5 / 256)
    assert torch.equal(merge("w", weight, (b, a), 1.0), merge("w", weight, (b, a), 1.0))
    assert torch.equal(merge("w", weight, (torch.zeros_like(b), a), 1.0), weight)


def test_merged_weights_are_w_plus_s_b_a(fresh_policy):
    policy = adapted(fresh_policy("qwen2"))
    for weight in policy.weights():
        if weight.factors:
            b, a = (factor.detach().double() for factor in weight.factors)
            exact = weight.value.detach().double() + 2.0 * b @ a  # alpha 8, rank 4
            found = merge(weight.name, weight.value, weight.factors, weight.scale)
            assert float((found.double() - exact).abs().max()) <= rounding(6, float(exact.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_learner_goes_on_bit_for_bit(dtype, dropout, fresh_policy, make_train_groups, tmp_path):
    def fresh(folder=None):
        sampling = fresh_policy("qwen2_vl", dtype=dtype)
        policy = add_adapters(sampling, lora_config(**SMALL, dropout=dropout, target=ALL), base="x", seed=0)
        if folder:
            policy.adapters.load(folder)
        learner = new_learner(policy, loss_config(kl_coef=0.04), mini_batches=2)
        if folder:
            learner.load(folder)
        return learner

    batches = [make_train_groups("qwen2_vl", 3, seed=seed) for seed in range(4)]
    whole, metrics = fresh(), []
    for number, batch in enumerate(batches):
        metrics.append(whole.step(batch))
        if number == 1:
            whole.save(tmp_path)()
        torch.manual_seed(number)  # nothing may hang on torch's own generator
    resumed = fresh(tmp_path)
    assert [resumed.step(batch) for batch in batches[2:]] == metrics[2:]
    assert identical(factors(resumed.policy), factors(whole.policy))
    assert identical(dict(resumed.full_weights()), dict(whole.full_weights()))
    if dropout:
        assert fresh().step(batches[0])["grad_norm"] == metrics[0]["grad_norm"]
        learner = fresh()
        learner.optimizer.steps_taken = 7
        assert learner.step(batches[0])["grad_norm"] != metrics[0]["grad_norm"]  # each step draws anew


def test_supervised_training_moves_adapters_alone(fresh_policy, make_prompt, tmp_path):
    sampling = fresh_policy("qwen2_vl")
    before = weights(sampling.model)
    policy = add_adapters(sampling, lora_config(**SMALL, target=ALL), base="x", seed=0)
    learner = SupervisedLearner(policy, learner_config(lr=1e-2, lr_schedule="constant"), total_steps=8)
    items = [
        written_item(make_prompt("qwen2_vl", 3, length=9, grid=(4, 4)), np.array([40, 41, 42])),
        written_item(make_prompt("qwen2_vl", 4, length=5), np.array([50, 51])),
    ]
    losses = [learner.step(items)["loss"] for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    assert identical({weight.name: weight.value.detach() for weight in policy.weights()}, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_a_model(dtype, tiny_folder, fresh_policy, make_train_groups, tmp_path):
    """Loaded as one, it has the very weights that the engine had."""
    sampling = fresh_policy("qwen2_vl", dtype=dtype)
    policy = add_adapters(sampling, lora_config(**SMALL, target=ALL), base=str(tiny_folder("qwen2_vl")), seed=0)
    policy.adapters.give_to(sampling)
    learner = new_learner(policy, lr=1e-2)
    learner.step(make_train_groups("qwen2_vl", 4))
    policy.publish()
    learner.save(tmp_path)()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json"} <= names
    assert not any(name.startswith("model") for name in names)
    loaded = load_policy(tmp_path, dtype=dtype)
    assert identical(weights(loaded.model), weights(sampling.model))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["base_model_name_or_path"]) == (4, str(tiny_folder("qwen2_vl")))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.") for name in stored)
    assert sum(value.numel() for value in stored.values()) == sum(
        value.numel() for value in policy.adapters.parameters().values()
    )


def test_a_model_without_layers_in_the_target_is_refused(fresh_policy):
    with pytest.raises(ValueError, match=r"learner\.lora\.target=\['vision'\]: model tiny has no linear layers"):
        add_adapters(fresh_policy("qwen2"), lora_config(**SMALL, target=("vision",)), base="tiny", seed=0)


def test_the_first_ratio_is_one_and_the_first_reference_the_policy(
    fresh_policy, mixed_prompts, run_engine, make_train_groups
):
    sampling = fresh_policy("qwen2_vl")
    policy = add_adapters(sampling, lora_config(**SMALL), base="x", seed=0)
    policy.adapters.give_to(sampling)
    groups = run_engine(sampling, mixed_prompts("qwen2_vl", 4), group_size=4, temperature=TEMPERATURE)
    rewards = np.arange(4, dtype=np.float32)
    advantages = group_advantages(torch.from_numpy(rewards), "grpo").numpy()
    batch = [TrainGroup(ScoredGroup(group, rewards, {}), advantages) for group in groups]
    loss = dataclasses.replace(loss_config(kl_coef=0.04), old_logprobs="rollout")
    metrics = new_learner(policy, loss).step(batch)
    assert metrics["ratio"] == pytest.approx(1.0, abs=LOGPROBS / TEMPERATURE)
    assert metrics["kl"] < LOGPROBS**2  # B is zero: the policy is still its reference
