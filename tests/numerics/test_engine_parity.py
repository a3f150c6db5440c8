"""The native engine against transformers, and against itself in other company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from rlmed.core.types import Example, Prompt, RolloutRequest, SamplingParams
from rlmed.data.prompts import PromptRenderer, load_processor
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits

VISION = ("qwen2_vl", "qwen2_5_vl")
FAMILIES = (*VISION, "qwen2", "qwen3", "llama")
TOLERANCE = 1e-4
WORDS = "which part of the body is shown in this scan and what does it tell about the patient".split()
SIZES = ((112, 112), None, (56, 84), (300, 40), None, (64, 128), (57, 61))


def rendered_prompts(folder, count):
    """Questions of many lengths through the real renderer, most with a picture of another size."""
    renderer = PromptRenderer(*load_processor(folder), max_prompt_tokens=1024, template="{question}")
    prompts = []
    for i in range(count):
        rng = np.random.default_rng(i)
        options = tuple(f"{letter} {word}" for letter, word in zip("wxyz", rng.choice(WORDS, 4), strict=True))
        example = Example(str(i), None, " ".join(rng.choice(WORDS, 2 + 5 * i % 23)), options[: 2 + i % 3], answer=0)
        size = SIZES[i % len(SIZES)]
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) if size else None
        prompts.append(renderer.render(example, image))
    return prompts


def generated(model, inputs, max_tokens):
    """Greedy tokens of transformers, each row cut after its first end token."""
    banned = [model.config.to_dict().get(f"{name}_token_id") for name in ("image", "video", "vision_start", "vision_end")]
    suppressed = [token for token in banned if token is not None] or None
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens, suppress_tokens=suppressed)
    ends = set(model.generation_config.eos_token_id)
    rows = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), max_tokens)
        rows.append(row[:stop])
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_generate(
    family, tiny_folder, tiny_policy, transformers_model, mixed_prompts, padded_inputs, run_engine
):
    if family in VISION:
        prompts = [*rendered_prompts(tiny_folder(family), 35), *mixed_prompts(family, 30)]
        grids = {tuple(prompt.image_inputs["image_grid_thw"][0]) for prompt in prompts if prompt.image_inputs}
        assert len(grids) >= 6
        assert sum(not prompt.image_inputs for prompt in prompts) >= 16
    else:
        prompts = mixed_prompts(family, 24)
    assert len({len(prompt.token_ids) for prompt in prompts}) >= 16
    groups = run_engine(tiny_policy(family), prompts, temperature=0.0, max_tokens=16)
    model = transformers_model(family)
    expected = []
    nothing = np.zeros(0, dtype=np.int64)
    for start in range(0, len(prompts), 13):
        batch = [(prompt, nothing) for prompt in prompts[start : start + 13]]
        inputs = padded_inputs(model, batch, "left")
        inputs.pop("position_ids", None)
        expected += generated(model, inputs, 16)
    assert [group.completions[0].token_ids.tolist() for group in groups] == expected
    assert {group.completions[0].finish_reason for group in groups} == {"stop", "length"}
    # the models answer to their prompts: otherwise equality would show little
    assert len({tuple(tokens) for tokens in expected}) > len(prompts) // 2


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 9, 1.0), (1.3, 0, 0.8), (0.7, 40, 0.9)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_padded_transformers_forward(
    family, temperature, top_k, top_p, tiny_policy, transformers_model, mixed_prompts, run_engine, padded_logprobs
):
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    groups = run_engine(tiny_policy(family), mixed_prompts(family, 9), group_size=3, **sampling)
    rows = [(group.prompt, completion.token_ids) for group in groups for completion in group.completions]
    warpers = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    with torch.inference_mode():
        expected = padded_logprobs(
            transformers_model(family),
            rows,
            temperature=temperature,
            warpers=warpers,
            side="left" if temperature < 1 else "right",
        )
    actual = [completion.rollout_logprobs for group in groups for completion in group.completions]
    worst = max(np.abs(one.numpy() - other).max() for one, other in zip(expected, actual, strict=True))
    assert worst <= TOLERANCE, worst
    print("PARITY", family, sampling, worst)


def test_greedy_logprobs_are_those_of_temperature_one(
    tiny_policy, transformers_model, mixed_prompts, run_engine, padded_logprobs
):
    groups = run_engine(tiny_policy("qwen2"), mixed_prompts("qwen2", 4), temperature=0.0)
    with torch.inference_mode():
        rows = [(group.prompt, group.completions[0].token_ids) for group in groups]
        expected = torch.cat(padded_logprobs(transformers_model("qwen2"), rows))
    actual = np.concatenate([group.completions[0].rollout_logprobs for group in groups])
    np.testing.assert_allclose(actual, expected.numpy(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3"])
def test_company_order_and_number_of_slots_change_nothing(
    family, tiny_policy, mixed_prompts, run_engine, worst_difference
):
    policy, prompts = tiny_policy(family), mixed_prompts(family, 12)
    together = run_engine(policy, prompts, group_size=4)
    alone = []
    for i, prompt in enumerate(prompts):
        engine = NativeEngine(policy, lambda _: "")
        engine.submit(RolloutRequest(i, prompt, 4, SamplingParams(max_tokens=24, seed=i)))
        while engine.busy:
            alone += engine.step()
    worst = {"alone": worst_difference(together, alone)}
    order = np.random.default_rng(0).permutation(12).tolist()
    worst["order"] = worst_difference(together, run_engine(policy, prompts, group_size=4, order=order))
    # continuous batching: slots are taken over by groups of other lengths; prompts enter in several prefills
    few = EngineLimits(max_completions=9, prefill_tokens=60)
    worst["slots"] = worst_difference(together, run_engine(policy, prompts, group_size=4, order=order, limits=few))
    assert max(worst.values()) <= TOLERANCE, worst
    print("COMPANY", family, worst)


def test_the_first_completions_of_a_larger_group_are_those_of_a_smaller_one(
    tiny_policy, mixed_prompts, run_engine, worst_difference
):
    policy, prompts = tiny_policy("qwen2_vl"), mixed_prompts("qwen2_vl", 3)
    few, many = run_engine(policy, prompts, group_size=1), run_engine(policy, prompts, group_size=6)
    for one, other in zip(few, many, strict=True):
        assert one.completions[0].token_ids.tolist() == other.completions[0].token_ids.tolist()
        assert len({completion.token_ids.tobytes() for completion in other.completions}) == 6


def test_rows_with_other_settings_change_nothing(tiny_policy, mixed_prompts, worst_difference):
    policy, prompts = tiny_policy("qwen2"), mixed_prompts("qwen2", 4)
    settings = [
        SamplingParams(max_tokens=20, seed=0),
        SamplingParams(max_tokens=9, seed=1, top_p=0.5),
        SamplingParams(max_tokens=30, seed=2, top_k=3, temperature=0.7),
        SamplingParams(max_tokens=12, seed=3, temperature=0.0),
    ]
    requests = [RolloutRequest(i, prompts[i], 2, settings[i]) for i in range(4)]

    def run(batch):
        engine, groups = NativeEngine(policy, lambda _: ""), []
        for request in batch:
            engine.submit(request)
        while engine.busy:
            groups += engine.step()
        return sorted(groups, key=lambda group: group.request.index)

    assert worst_difference(run(requests), [group for request in requests for group in run([request])]) <= TOLERANCE


def test_a_prompt_and_its_image_are_computed_once_per_group(tiny_policy, mixed_prompts, run_engine):
    policy, prompts = tiny_policy("qwen2_vl"), mixed_prompts("qwen2_vl", 9)
    fed, patches = [], []
    hooks = [
        policy.model.get_input_embeddings().register_forward_hook(lambda _, args, __: fed.append(args[0].numel())),
        policy.model.base_model.visual.patch_embed.register_forward_hook(
            lambda _, args, __: patches.append(args[0].shape[0])
        ),
    ]
    try:
        groups = run_engine(policy, prompts, group_size=8, limits=EngineLimits(max_completions=24))
    finally:
        for hook in hooks:
            hook.remove()
    # a completion's last token is never fed
    decoded = sum(len(completion.token_ids) - 1 for group in groups for completion in group.completions)
    assert sum(fed) == sum(len(prompt.token_ids) for prompt in prompts) + decoded
    assert sum(patches) == sum(prompt.image_inputs["pixel_values"].shape[0] for prompt in prompts if prompt.image_inputs)
    # three groups fit at a time; the vision tower runs once per prefill, over all of its images
    assert len(patches) <= len(prompts)


def test_versions_say_which_weights_produced_the_tokens(tiny_policy, make_prompt):
    policy = tiny_policy("qwen2")
    engine = NativeEngine(policy, lambda _: "", EngineLimits(max_completions=4))
    lengths = (3, 12, 5)
    for i, max_tokens in enumerate(lengths):
        engine.submit(RolloutRequest(i, make_prompt("qwen2", i, length=5 + i), 2, SamplingParams(max_tokens=max_tokens, seed=40 + i)))
    groups = {}
    steps = 0
    while engine.busy:
        groups |= {group.request.index: group for group in engine.step()}
        steps += 1
        if steps == 4:
            engine.update_weights(7)
    assert [len(completion.token_ids) for completion in groups[1].completions] == [12, 12]
    versions = {i: [(entry.min_version, entry.max_version) for entry in group.completions] for i, group in groups.items()}
    assert versions[0] == [(0, 0)] * 2
    assert versions[1] == [(0, 7)] * 2
    assert versions[2][0][1] == 7
    assert groups[1].min_version == 0


def test_the_engine_samples_from_the_parameters_as_they_are_now(fresh_policy, mixed_prompts, run_engine, worst_difference):
    policy, other = fresh_policy("qwen2"), fresh_policy("qwen2", seed=5)
    prompts = mixed_prompts("qwen2", 3)
    engine = NativeEngine(policy, lambda _: "")

    def run(index):
        engine.submit(RolloutRequest(index, prompts[0], 2, SamplingParams(max_tokens=8, seed=0)))
        groups = []
        while engine.busy:
            groups += engine.step()
        return groups

    before = run(0)
    with torch.no_grad():
        for parameter, new in zip(policy.model.parameters(), other.model.parameters(), strict=True):
            parameter.copy_(new)
    engine.update_weights(1)
    after = run(1)
    assert worst_difference(after, run_engine(other, prompts[:1], group_size=2, max_tokens=8)) <= TOLERANCE
    assert before[0].completions[0].token_ids.tolist() != after[0].completions[0].token_ids.tolist()
    assert (after[0].completions[0].min_version, after[0].completions[0].max_version) == (1, 1)


def test_bfloat16_stays_near_the_learner(fresh_policy, mixed_prompts, run_engine):
    from learner.packing import PackItem, TrainSequence, pack, packed_logprobs

    policy = fresh_policy("qwen2_vl", dtype="bfloat16")
    groups = run_engine(policy, mixed_prompts("qwen2_vl", 6), group_size=4)
    items = [PackItem(g.prompt, tuple(TrainSequence(c, 1.0) for c in g.completions)) for g in groups]
    batch = pack(items, policy)
    with torch.no_grad():
        logprobs, _ = packed_logprobs(policy, batch, 1.0)
    difference = (logprobs - batch.rollout_logprobs).abs()
    print("BF16", difference.mean(), difference.max())
