"""The native engine against itself: order, company, slots change nothing; one prefill a prompt."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rlmed.core.types import RolloutRequest, SamplingParams
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from rollout.native.slots import StepPlan
from tests.plans import PLANS
from tests.rounding import LOGPROBS, distance_from_edge, worst_difference


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch):
    """Engines of the test run on each of the plans."""
    monkeypatch.setattr(StepPlan, "for_device", lambda device: PLANS[request.param])
    return PLANS[request.param]


def run_requests(engine, requests):
    """All groups, in the order of their indices."""
    groups = []
    for request in requests:
        engine.submit(request)
    while engine.busy:
        groups += engine.step()
    return sorted(groups, key=lambda group: group.request.index)


def new_engine(policy, **limits):
    return NativeEngine(policy, lambda _: "", EngineLimits(**limits))


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3"])
def test_company_order_and_number_of_slots_change_nothing(
    family, tiny_policy, mixed_prompts, run_engine, record_property
):
    policy, prompts = tiny_policy(family), mixed_prompts(family, 12)
    together = run_engine(policy, prompts, group_size=4)
    alone = [run_requests(new_engine(policy), [group.request])[0] for group in together]
    order = np.random.default_rng(0).permutation(12).tolist()
    # continuous batching: slots are taken over by groups of other lengths, and prompts enter in
    # several prefills
    few = EngineLimits(max_completions=9, prefill_tokens=60)
    differences = {
        "alone": worst_difference(together, alone, policy),
        "order": worst_difference(together, run_engine(policy, prompts, group_size=4, order=order), policy),
        "slots": worst_difference(together, run_engine(policy, prompts, group_size=4, order=order, limits=few), policy),
    }
    record_property("worst", differences)
    assert max(differences.values()) <= LOGPROBS


@pytest.mark.usefixtures("plan")
def test_a_completion_alone_is_the_same_as_in_a_full_batch(tiny_policy, mixed_prompts, run_engine):
    policy, prompts = tiny_policy("qwen2_vl"), mixed_prompts("qwen2_vl", 8)
    many = run_engine(policy, prompts, group_size=8)
    first_of_many = [
        dataclasses.replace(
            group, request=dataclasses.replace(group.request, group_size=1), completions=group.completions[:1]
        )
        for group in many
    ]
    singles = [run_requests(new_engine(policy), [group.request])[0] for group in first_of_many]
    assert worst_difference(first_of_many, singles, policy) <= LOGPROBS
    # the completions of a group are drawn from streams of their own
    assert all(len({completion.token_ids.tobytes() for completion in group.completions}) >= 6 for group in many)


def test_an_edge_is_near_the_drawn_token_only(tiny_policy, mixed_prompts, run_engine):
    policy = tiny_policy("qwen2")
    group = run_engine(policy, mixed_prompts("qwen2", 1), group_size=4)[0]
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    for number, completion in enumerate(group.completions):
        drawn = int(completion.token_ids[0])
        assert distance_from_edge(policy, group, number, 0, drawn) < LOGPROBS
        far = [distance_from_edge(policy, group, number, 0, token) for token in range(0, vocabulary, 7)]
        assert sum(distance > LOGPROBS for distance in far) > 0.9 * len(far)


@pytest.mark.usefixtures("plan")
def test_neighbours_with_other_settings_change_nothing(tiny_policy, mixed_prompts):
    policy, prompts = tiny_policy("qwen2"), mixed_prompts("qwen2", 4)
    settings = [
        SamplingParams(max_tokens=20, seed=0),
        SamplingParams(max_tokens=9, seed=1, top_p=0.5),
        SamplingParams(max_tokens=30, seed=2, top_k=3, temperature=0.7),
        SamplingParams(max_tokens=12, seed=3, temperature=0.0),
    ]
    requests = [RolloutRequest(i, prompts[i], 2, settings[i]) for i in range(4)]
    together = run_requests(new_engine(policy), requests)
    alone = [run_requests(new_engine(policy), [request])[0] for request in requests]
    coldest = 0.7  # rounding of logits counts for more at a lower temperature
    assert worst_difference(together, alone, policy) <= LOGPROBS / coldest


def test_a_prompt_and_its_image_are_computed_once_per_group(tiny_policy, mixed_prompts, run_engine):
    policy, prompts = tiny_policy("qwen2_vl"), mixed_prompts("qwen2_vl", 9)
    fed, patches = [], []
    text, vision = policy.model.get_input_embeddings(), policy.model.base_model.visual.patch_embed
    hooks = [
        text.register_forward_hook(lambda _, args, __: fed.append(args[0].numel())),
        vision.register_forward_hook(lambda _, args, __: patches.append(len(args[0]))),
    ]
    try:
        groups = run_engine(policy, prompts, group_size=8, limits=EngineLimits(max_completions=24))
    finally:
        for hook in hooks:
            hook.remove()
    # a completion's last token is never fed
    decoded = sum(len(completion.token_ids) - 1 for group in groups for completion in group.completions)
    assert sum(fed) == sum(len(prompt.token_ids) for prompt in prompts) + decoded
    images = [prompt.image_inputs["pixel_values"] for prompt in prompts if prompt.image_inputs]
    assert sum(patches) == sum(map(len, images))
    assert len(patches) <= len(images)


@pytest.mark.usefixtures("plan")
def test_versions_say_which_weights_produced_the_tokens(fresh_policy, make_prompt):
    policy = fresh_policy("qwen2")
    policy.end_token_ids = frozenset()  # completions end at their limits only
    engine = new_engine(policy, max_completions=4)
    # the first group ends in version 0, the second lives through the update, the third starts after
    # it
    for i, max_tokens in enumerate((2, 12, 5)):
        sampling = SamplingParams(max_tokens=max_tokens, seed=40 + i)
        engine.submit(RolloutRequest(i, make_prompt("qwen2", i, length=5 + i), 2, sampling))
    groups = {}
    for step in range(100):
        if step == 2:
            engine.update_weights(7)
        if engine.busy:
            groups |= {group.request.index: group for group in engine.step()}
    versions = {
        i: {(entry.min_version, entry.max_version) for entry in group.completions} for i, group in groups.items()
    }
    assert versions == {0: {(0, 0)}, 1: {(0, 7)}, 2: {(7, 7)}}
    assert [groups[i].min_version for i in range(3)] == [0, 0, 7]


@pytest.mark.usefixtures("plan")
def test_the_engine_samples_from_the_parameters_as_they_are_now(fresh_policy, mixed_prompts):
    policy, other = fresh_policy("qwen2"), fresh_policy("qwen2", seed=5)
    request = RolloutRequest(0, mixed_prompts("qwen2", 1)[0], 2, SamplingParams(max_tokens=8))
    engine = new_engine(policy)
    (before,) = run_requests(engine, [request])
    with torch.no_grad():
        for parameter, new in zip(policy.model.parameters(), other.model.parameters(), strict=True):
            parameter.copy_(new)
    engine.update_weights(1)
    (after,) = run_requests(engine, [request])
    (expected,) = run_requests(new_engine(other), [request])
    assert worst_difference([expected], [after], other) <= LOGPROBS
    for one, old in zip(after.completions, before.completions, strict=True):
        assert one.token_ids.tolist() != old.token_ids.tolist()
        assert (one.min_version, one.max_version) == (1, 1)


@pytest.mark.parametrize("name", ["static", "behind"])
def test_every_plan_samples_the_same(name, tiny_policy, mixed_prompts):
    policy, prompts = tiny_policy("qwen2_vl"), mixed_prompts("qwen2_vl", 9)
    requests = [
        RolloutRequest(i, prompts[i], 1 + i % 4, SamplingParams(max_tokens=4 + 3 * i, seed=i, temperature=i % 3 / 2))
        for i in range(9)
    ]
    groups = [
        run_requests(NativeEngine(policy, lambda _: "", EngineLimits(max_completions=12), PLANS[plan]), requests)
        for plan in ("exact", name)
    ]
    assert worst_difference(*groups, policy) <= LOGPROBS / 0.5
