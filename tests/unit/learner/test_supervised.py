"""Supervised fine-tuning: loss is the mean negative log-likelihood over tokens, however split."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from learner.supervised import SupervisedLearner, written_item
from tests.configs import learner_config
from tests.rounding import GRADIENTS, LOGPROBS


@pytest.fixture
def items(make_prompt):
    rng = np.random.default_rng(0)
    grids = ((4, 4), None, (2, 6), None)
    return [
        written_item(make_prompt("qwen2_vl", i, length=5 + 4 * i, grid=grid), rng.integers(20, 300, 1 + 6 * i))
        for i, grid in enumerate(grids)
    ]


def new_learner(policy, **config):
    return SupervisedLearner(
        policy, learner_config(**{"lr": 1e-3, "lr_schedule": "constant", **config}), total_steps=20
    )


def likelihood(model, item):
    """Log-probabilities of one written completion by transformers, all by itself."""
    token_ids = torch.from_numpy(np.concatenate([item.prompt.token_ids, item.sequences[0].completion.token_ids]))[None]
    inputs = {name: torch.from_numpy(array) for name, array in item.prompt.image_inputs.items()}
    inputs["mm_token_type_ids"] = (token_ids == model.config.image_token_id).int()
    logits = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), **inputs).logits[0]
    names = ("image", "video", "vision", "vision_start", "vision_end")
    banned = [getattr(model.config, f"{name}_token_id") for name in names]
    start = len(item.prompt.token_ids)
    logprobs = logits[start - 1 : -1].index_fill(1, torch.tensor(banned), -math.inf).log_softmax(1)
    return logprobs.gather(1, token_ids[0, start:, None])[:, 0]


def test_loss_and_metrics_are_those_of_transformers(items, fresh_policy, transformers_model):
    with torch.no_grad():
        logprobs = torch.cat([likelihood(transformers_model("qwen2_vl"), item) for item in items])
    metrics = new_learner(fresh_policy("qwen2_vl")).step(items)
    assert metrics["tokens"] == len(logprobs) == 1 + 7 + 13 + 19
    assert metrics["loss"] == pytest.approx(-logprobs.mean().item(), abs=LOGPROBS)
    assert metrics["tokens_above_half"] == pytest.approx((logprobs > math.log(0.5)).float().mean().item())
    assert metrics["lr"] == 1e-3


def test_the_split_into_micro_batches_changes_nothing(items, fresh_policy):
    results = [new_learner(fresh_policy("qwen2_vl"), token_budget=budget).step(items) for budget in (10_000, 60, 1)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=GRADIENTS)


def test_steps_raise_the_likelihood(items, fresh_policy):
    learner = new_learner(fresh_policy("qwen2_vl"), lr=3e-3, gradient_checkpointing=True)
    losses = [learner.step(items)["loss"] for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_broken_step_is_skipped(items, fresh_policy):
    policy = fresh_policy("qwen2_vl")
    learner, before = new_learner(policy), [entry.clone() for entry in policy.model.parameters()]
    hook = next(policy.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    assert learner.step(items)["skipped_steps"] == 1
    hook.remove()
    assert all(torch.equal(old, new) for old, new in zip(before, policy.model.parameters(), strict=True))
    assert learner.step(items)["grad_norm"] > 0
    assert learner.optimizer.steps_taken == 1
