"""A whole step's gradient: equals a slow padded GRPO's, however the step is cut into pieces."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from learner.learner import PolicyLearner
from learner.packing import PackItem, TrainSequence, split_by_tokens
from tests.configs import learner_config, loss_config
from tests.padded_grpo import padded_loss
from tests.rounding import GRADIENTS, LOGPROBS, gradient_bound
from tests.tiny_vision import TILE_FAMILIES

TEMPERATURE = 0.9


def nudged(model):
    """The model with each parameter moved a little, like a reference that training left behind."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def step_gradient(fresh_policy):
    """The gradient that `PolicyLearner.step` hands its optimizer, by parameter, and metrics."""

    def compute(family, groups, loss=None, policy=None, **config):
        policy, loss = policy or fresh_policy(family), loss or loss_config()
        reference = None
        if loss.kl_coef:
            reference = fresh_policy(family)
            nudged(reference.model)
        learner = PolicyLearner(
            policy,
            reference,
            loss,
            learner_config(**config),
            total_steps=1,
            max_tokens=32,
            temperature=TEMPERATURE,
        )
        gradient = {}

        def take_gradient():
            gradient.update({name: parameter.grad for name, parameter in policy.model.named_parameters()})
            return 1.0

        learner.optimizer.step = take_gradient
        return gradient, learner.step(groups)

    return compute


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", *TILE_FAMILIES, "llama"])
def test_the_gradient_is_that_of_a_slow_padded_grpo(
    family, step_gradient, worst_relative, make_train_groups, transformers_model, padded_logprobs, record_property
):
    groups = make_train_groups(family, 4)
    rows = [(group.rollout.prompt, entry.token_ids) for group in groups for entry in group.rollout.completions]
    advantages = [advantage for group in groups for advantage in group.advantages.tolist()]
    model = transformers_model(family)
    with torch.no_grad():
        references = padded_logprobs(nudged(transformers_model(family)), rows, temperature=TEMPERATURE)
    loss = padded_loss(padded_logprobs(model, rows, temperature=TEMPERATURE), references, advantages)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    actual, metrics = step_gradient(family, groups, loss_config(kl_coef=0.04))
    worst = worst_relative(actual, expected)
    record_property("gradients", worst)
    assert worst[0] <= gradient_bound(family)
    # the ratios are 1, so rounding reaches the loss through the penalty alone: 0.04 · |1 - exp(d)|,
    # d below 1
    assert metrics["loss"] == pytest.approx(loss.item(), abs=0.04 * 2 * LOGPROBS)
    assert metrics["kl"] > 1e-3


ALGORITHMS = {
    "grpo": loss_config(kl_coef=0.04),
    "token mean": loss_config(kl_coef=0.0, aggregation="token_mean", clip="dual"),
    "dr grpo": loss_config(kl_coef=0.0, aggregation="sequence_sum"),
    "gspo, old from the engine": loss_config(
        kl_coef=0.0, ratio_level="sequence", clip_ratio_low=1.0, clip_ratio_high=1e9, old_logprobs="rollout"
    ),
}


@pytest.mark.parametrize("loss", ALGORITHMS.values(), ids=ALGORITHMS)
def test_the_gradient_does_not_change_with_the_token_budget(
    loss, step_gradient, worst_relative, make_train_groups, record_property
):
    groups = make_train_groups("qwen2_vl", 4)
    items = [PackItem(g.rollout.prompt, tuple(TrainSequence(c, 1.0) for c in g.rollout.completions)) for g in groups]
    pieces = {budget: split_by_tokens(items, budget) for budget in (10**6, 250, 60, 1)}
    assert [len(split) for split in pieces.values()][:2] == [1, 2]
    # the small budgets cut groups in two, and in single completions
    assert len(items) < len(pieces[60]) < len(pieces[1]) == sum(len(item.sequences) for item in items)
    gradients, metrics = {}, {}
    for budget in pieces:
        gradients[budget], metrics[budget] = step_gradient("qwen2_vl", groups, loss, token_budget=budget)
    worst = max(worst_relative(gradients[budget], gradients[10**6]) for budget in pieces)
    record_property("gradients", worst)
    assert worst[0] <= GRADIENTS
    for budget in pieces:
        assert metrics[budget] == pytest.approx(metrics[10**6], rel=2 * LOGPROBS, abs=LOGPROBS)


def test_the_order_of_groups_and_of_completions_changes_nothing(step_gradient, worst_relative, make_train_groups):
    groups = make_train_groups("qwen2_5_vl", 4)
    expected, _ = step_gradient("qwen2_5_vl", groups)
    shuffled = [backwards(groups[i]) for i in (3, 0, 4, 2, 1)]
    actual, _ = step_gradient("qwen2_5_vl", shuffled, token_budget=100)
    assert worst_relative(actual, expected)[0] <= GRADIENTS


def backwards(group):
    """A train group with its completions in the opposite order."""
    rollout = dataclasses.replace(group.rollout, completions=group.rollout.completions[::-1])
    scored = dataclasses.replace(group.scored, rollout=rollout)
    return dataclasses.replace(group, scored=scored, advantages=group.advantages[::-1].copy())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3", "qwen3_vl", *TILE_FAMILIES])
def test_gradient_checkpointing_gives_the_same_gradient(
    family, fresh_policy, step_gradient, worst_relative, make_train_groups
):
    groups = make_train_groups(family, 4)
    policy, runs = fresh_policy(family), []
    layer = policy.model.base_model.get_decoder().layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    actual, _ = step_gradient(family, groups, loss_config(kl_coef=0.0), policy, gradient_checkpointing=True)
    assert len(runs) == 2  # once forward, once more in the backward pass
    assert not policy.model.training
    expected, _ = step_gradient(family, groups, loss_config(kl_coef=0.0))
    assert worst_relative(actual, expected)[0] <= gradient_bound(family)


def test_a_masked_completion_has_no_influence(step_gradient, worst_relative, make_train_groups):
    groups = make_train_groups("qwen2", 4)
    loss = loss_config(kl_coef=0.0, mask_truncated=True)
    completions = groups[0].rollout.completions
    cut = dataclasses.replace(completions[1], finish_reason="length")
    rollout = dataclasses.replace(groups[0].rollout, completions=(completions[0], cut, *completions[2:]))
    truncated = dataclasses.replace(groups[0], scored=dataclasses.replace(groups[0].scored, rollout=rollout))
    without = dataclasses.replace(rollout, completions=(completions[0], *completions[2:]))
    scored = dataclasses.replace(groups[0].scored, rollout=without)
    shorter = dataclasses.replace(groups[0], scored=scored, advantages=groups[0].advantages[[0, 2, 3]])
    expected, _ = step_gradient("qwen2", [shorter, *groups[1:]], loss)
    actual, _ = step_gradient("qwen2", [truncated, *groups[1:]], loss)
    assert worst_relative(actual, expected)[0] <= GRADIENTS


def test_a_batch_without_a_trained_token_is_no_update(fresh_policy, make_train_groups):
    """Momentum alone would move the weights."""
    groups = make_train_groups("qwen2", 4)
    policy = fresh_policy("qwen2")
    loss, config = loss_config(kl_coef=0.0, mask_truncated=True), learner_config(lr=1e-2)
    learner = PolicyLearner(policy, None, loss, config, total_steps=3, max_tokens=32, temperature=1.0)
    start = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    learner.step(groups)
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    assert any(not torch.equal(start[name], before[name]) for name in start)
    cut = []
    for group in groups:
        completions = tuple(dataclasses.replace(entry, finish_reason="length") for entry in group.rollout.completions)
        rollout = dataclasses.replace(group.rollout, completions=completions)
        cut.append(dataclasses.replace(group, scored=dataclasses.replace(group.scored, rollout=rollout)))
    assert "grad_norm" not in learner.step(cut)
    assert learner.policy_version == 1
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.model.named_parameters())
