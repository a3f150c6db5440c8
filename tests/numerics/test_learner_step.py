"""`PolicyLearner.step`: ratio 1 first, master weights, frozen parts, broken numbers, resuming."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from learner.advantages import group_advantages
from learner.checkpoint import OPTIMIZER_FOLDER
from learner.learner import PolicyLearner
from rlmed.core.types import ScoredGroup, TrainGroup
from rlmed.models.families import PARTS
from rlmed.models.policy import load_policy
from tests.configs import learner_config, loss_config
from tests.rounding import LOGPROBS, smooth_updates, updates_apart

NO_KL = loss_config(kl_coef=0.0)


def new_learner(policy, loss=NO_KL, *, reference=None, temperature=1.0, on_bad_step=None, total_steps=10, **config):
    settings = learner_config(**{"lr": 1e-3, "lr_schedule": "constant", **config})
    return PolicyLearner(
        policy,
        reference,
        loss,
        settings,
        total_steps=total_steps,
        max_tokens=32,
        temperature=temperature,
        on_bad_step=on_bad_step,
    )


def weights(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}


def moved(policy, before):
    """Names of the parameters that are not bit for bit what they were."""
    return {name for name, parameter in policy.model.named_parameters() if not torch.equal(parameter, before[name])}


def spoiled(groups, value):
    """The groups with a broken number in one completion's rollout log-probabilities."""
    completion = groups[0].rollout.completions[0]
    broken = np.full_like(completion.rollout_logprobs, value)
    completions = (dataclasses.replace(completion, rollout_logprobs=broken), *groups[0].rollout.completions[1:])
    rollout = dataclasses.replace(groups[0].rollout, completions=completions)
    first = dataclasses.replace(groups[0], scored=dataclasses.replace(groups[0].scored, rollout=rollout))
    return [first, *groups[1:]]


@pytest.mark.parametrize(("family", "temperature"), [("qwen2_vl", 1.0), ("qwen2_5_vl", 0.7), ("llama", 1.0)])
def test_the_first_ratio_on_engine_groups_is_one(
    family, temperature, fresh_policy, mixed_prompts, run_engine, record_property
):
    policy = fresh_policy(family)
    groups = run_engine(policy, mixed_prompts(family, 8), group_size=4, temperature=temperature)
    rewards = np.arange(4, dtype=np.float32)
    advantages = group_advantages(torch.from_numpy(rewards), "grpo").numpy()
    batch = [TrainGroup(ScoredGroup(group, rewards, {}), advantages) for group in groups]
    # first the ratio against the engine's own numbers, without an update; then a real step
    probe = new_learner(policy, dataclasses.replace(NO_KL, old_logprobs="rollout"), temperature=temperature)
    probe.optimizer.step = lambda: 0.0
    metrics = probe.step(batch)
    record_property("ratio_max", metrics["ratio_max"])
    tolerance = LOGPROBS / temperature
    assert metrics["ratio"] == pytest.approx(1.0, abs=tolerance)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=2 * tolerance)
    policy.model.zero_grad()
    learner = new_learner(
        policy, loss_config(), reference=fresh_policy(family), temperature=temperature, token_budget=200
    )
    metrics = learner.step(batch)
    record_property("mismatch_kl", metrics["mismatch_kl"])
    assert metrics["mismatch_kl"] < tolerance**2
    assert metrics["ratio"] == metrics["ratio_max"] == 1.0
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0.0
    # the reference is still what the policy was before the step
    assert metrics["kl"] == pytest.approx(0.0, abs=tolerance**2)
    assert 0 < metrics["entropy"] < math.log(policy.projection.out_features)
    assert learner.step(batch)["kl"] > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_parameter_moves(dtype, fresh_policy, make_train_groups):
    policy = fresh_policy("qwen2_5_vl", dtype=dtype)
    before = weights(policy)
    metrics = new_learner(policy, lr=1e-2).step(make_train_groups("qwen2_5_vl", 4))
    assert moved(policy, before) == set(before)
    assert 0 < metrics["grad_norm"] < math.inf
    assert metrics["skipped_steps"] == 0


def test_bfloat16_updates_too_small_for_the_weights_add_up_in_the_masters(fresh_policy, make_train_groups):
    policy = fresh_policy("qwen2", dtype="bfloat16")
    learner, before = new_learner(policy, lr=1e-6), weights(policy)
    groups = make_train_groups("qwen2", 4)
    learner.step(groups)
    # a bfloat16 weight of 0.1 changes in steps of 5e-4: most weights cannot follow an update of
    # 1e-6
    name = "model.layers.0.mlp.up_proj.weight"
    after_one = weights(policy)[name]
    assert (after_one == before[name]).float().mean() > 0.99
    masters = learner.optimizer.state_dict()["masters"]
    assert masters.keys() == before.keys()
    assert {master.dtype for master in masters.values()} == {torch.float32}
    assert not any(torch.equal(master, before[key].float()) for key, master in masters.items())
    for _ in range(30):
        learner.step(groups)
    changes = {key: (master - before[key].float()).abs().max() for key, master in masters.items()}
    assert all(5e-6 < change < 4e-5 for change in changes.values())
    for key, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, masters[key].bfloat16())


@pytest.mark.parametrize(
    "frozen", [("vision",), ("vision", "merger"), ("language_model",), ("merger", "language_model")]
)
def test_frozen_parts_stay_bit_identical_and_all_others_move(frozen, fresh_policy, make_train_groups):
    policy = fresh_policy("qwen2_vl")
    before = weights(policy)
    part_of = {name: policy.family.part_of(name) for name in before}
    assert set(part_of.values()) == set(PARTS)
    learner = new_learner(policy, freeze=frozen, weight_decay=0.1)
    learner.step(make_train_groups("qwen2_vl", 4))
    assert moved(policy, before) == {name for name in before if part_of[name] not in frozen}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_the_step_and_leaves_no_trace(value, fresh_policy, make_train_groups):
    groups, reports = make_train_groups("qwen2", 4), []
    policy = fresh_policy("qwen2")
    # several micro-batches: the healthy ones leave gradients behind that must not reach the next
    # step
    learner = new_learner(policy, on_bad_step=lambda *report: reports.append(report), token_budget=60)
    before = weights(policy)
    bad = spoiled(groups, value)
    metrics = learner.step(bad)
    assert not moved(policy, before)
    assert (learner.policy_version, metrics["skipped_steps"]) == (0, 1)
    assert len(reports) == 1
    assert reports[0][0] is bad
    assert "nan" in reports[0][1]
    # the next step is exactly the first step of a run without the broken batch
    metrics = learner.step(groups)
    other = fresh_policy("qwen2")
    expected = new_learner(other, token_budget=60).step(groups)
    assert not moved(policy, weights(other))
    assert learner.policy_version == 1
    assert metrics == expected | {"skipped_steps": 1.0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_skips_the_step(dtype, fresh_policy, make_train_groups):
    policy, reports = fresh_policy("qwen2", dtype=dtype), []
    learner = new_learner(policy, on_bad_step=lambda *report: reports.append(report), token_budget=60, lr=1e-2)
    before, groups = weights(policy), make_train_groups("qwen2", 4)
    hook = next(policy.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    metrics = learner.step(groups)
    hook.remove()
    assert math.isfinite(metrics["loss"])
    assert not math.isfinite(metrics["grad_norm"])
    assert not moved(policy, before)
    assert (learner.policy_version, learner.skipped_steps, len(reports)) == (0, 1, 1)
    assert learner.step(groups)["grad_norm"] > 0
    assert moved(policy, before) == set(before)


def test_only_the_broken_mini_batch_is_skipped(fresh_policy, make_train_groups):
    policy = fresh_policy("qwen2")
    learner = new_learner(policy, mini_batches=2, epochs=2)
    learner.step(spoiled(make_train_groups("qwen2", 4), math.nan))
    assert (learner.policy_version, learner.skipped_steps) == (2, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_and_loaded_learner_goes_on_bit_for_bit(dtype, tmp_path, fresh_policy, make_train_groups):
    batches = [make_train_groups("qwen2_vl", 2, seed=seed) for seed in range(4)]
    settings = {"lr": 1e-4, "lr_schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.01, "total_steps": 5}
    policy = fresh_policy("qwen2_vl", dtype=dtype)
    learner = new_learner(policy, **settings)
    for batch in batches[:2]:
        learner.step(batch)
    learner.save(tmp_path)()
    resumed_policy = load_policy(tmp_path, dtype=dtype)
    assert not moved(resumed_policy, weights(policy))
    resumed = new_learner(resumed_policy, **settings)
    resumed.load(tmp_path)
    assert resumed.policy_version == 2
    for batch in batches[2:]:
        assert resumed.step(batch) == learner.step(batch)
    assert not moved(resumed_policy, weights(policy))


@pytest.mark.parametrize(
    ("dtype", "other_dtype", "freeze"),
    [
        ("float32", "float32", ("merger",)),
        ("float32", "float32", ()),
        ("float32", "bfloat16", ("vision",)),
        ("bfloat16", "float32", ("vision",)),
        ("bfloat16", "bfloat16", ("language_model",)),
    ],
)
def test_the_state_of_other_parameters_is_refused(
    dtype, other_dtype, freeze, tmp_path, fresh_policy, make_train_groups
):
    learner = new_learner(fresh_policy("qwen2_vl", dtype=dtype), freeze=("vision",))
    learner.step(make_train_groups("qwen2_vl", 2))
    learner.save(tmp_path)()
    assert (tmp_path / OPTIMIZER_FOLDER).is_dir()
    other = new_learner(load_policy(tmp_path, dtype=other_dtype), freeze=freeze)
    with pytest.raises(ValueError, match=r"model\.dtype and learner\.freeze"):
        other.load(tmp_path)


def test_epochs_and_mini_batches_make_several_updates_whose_ratios_leave_one(fresh_policy, make_train_groups):
    groups = make_train_groups("qwen2", 4)
    policy = fresh_policy("qwen2")
    learner = new_learner(policy, epochs=3, mini_batches=2, total_steps=2, lr_schedule="linear", lr=3e-3)
    first = learner.step(groups)
    assert learner.policy_version == 6
    assert first["lr"] == 3e-3
    assert first["ratio_max"] > 1.2
    clipped = first["clip_fraction_low"], first["clip_fraction_high"]
    assert all(0 < fraction < 1 for fraction in clipped)
    # the schedule counts optimizer steps: half of the 12 are done
    assert learner.optimizer.lr == pytest.approx(1.5e-3)
    # mismatch is between engine and learner before the updates, whatever they did
    single = new_learner(fresh_policy("qwen2")).step(groups)
    # the random rollout logprobs are far off: of exp(d) - 1 - d, a change of d is 3 times as much
    # at most
    assert first["mismatch_kl"] == pytest.approx(single["mismatch_kl"], rel=3 * LOGPROBS)


def test_the_first_update_of_many_is_the_single_update(fresh_policy, make_train_groups):
    groups = make_train_groups("qwen2", 4)
    once, many = fresh_policy("qwen2"), fresh_policy("qwen2")
    single, learner, seen = new_learner(once), new_learner(many, epochs=3), []
    for entry in (single, learner):
        smooth_updates(entry.optimizer)
    single.step(groups)
    update = learner.optimizer.step

    def update_and_look():
        norm = update()
        seen.append(weights(many))
        return norm

    learner.optimizer.step = update_and_look
    learner.step(groups)
    assert len(seen) == 3
    for name, value in weights(once).items():
        torch.testing.assert_close(seen[0][name], value, atol=updates_apart(1e-3, 1), rtol=0)
    assert any((seen[1][name] - value).abs().max() > 20 * updates_apart(1e-3, 1) for name, value in seen[0].items())


def test_a_batch_smaller_than_the_number_of_mini_batches_makes_fewer_updates(fresh_policy, make_train_groups):
    learner = new_learner(fresh_policy("qwen2"), mini_batches=4)
    learner.step(make_train_groups("qwen2", 4)[:3])
    assert learner.policy_version == 3


def test_reference_and_kl_coef_must_agree(fresh_policy):
    with pytest.raises(ValueError, match=r"kl_coef=0\.04 and no reference"):
        new_learner(fresh_policy("qwen2"), loss_config())
    with pytest.raises(ValueError, match=r"kl_coef=0\.0 and a reference"):
        new_learner(fresh_policy("qwen2"), reference=fresh_policy("qwen2"))
