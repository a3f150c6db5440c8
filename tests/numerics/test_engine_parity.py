"""Native engine against transformers: greedy tokens, and log-probabilities of sampled tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from learner.packing import PackItem, TrainSequence, pack, packed_logprobs
from rlmed.core.types import Example
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.models.families import unsampleable_token_ids
from tests.rounding import LOGPROBS, worst_difference
from tests.tiny_vision import TILE_FAMILIES

VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", *TILE_FAMILIES)
FAMILIES = (*VISION, "qwen2", "qwen3", "llama", "gemma3_text")
WORDS = ("which", "part", "of", "the", "body", "is", "shown", "in", "this", "scan", "what", "does", "it", "tell")
FEWEST_LENGTHS = {"gemma3": 1, "internvl": 2, "internvl_qwen2": 2, "llava_onevision": 2, "idefics3": 3, "smolvlm": 3}
"""Numbers of tiles that pictures have, at least; patches of the others differ more."""
PLAIN, LONG, LAST = (112, 112), (300, 40), (57, 61)
SIZES = ((PLAIN,), (), ((56, 84), PLAIN), (LONG,), (), ((64, 128), LAST, (28, 56), PLAIN, LAST), (LAST,))
"""Of the pictures of a prompt: one, none, two, five."""


def rendered_prompts(folder, count):
    """Questions of many lengths through the real renderer, most with pictures of other sizes."""
    renderer = PromptRenderer(*load_processor(folder), max_prompt_tokens=1024, template="{question}")
    prompts = []
    for i in range(count):
        rng = np.random.default_rng(i)
        options = tuple(f"{letter} {word}" for letter, word in zip("wxyz", rng.choice(WORDS, 4), strict=True))
        example = Example(str(i), None, " ".join(rng.choice(WORDS, 2 + 5 * i % 23)), options[: 2 + i % 3], answer=0)
        sizes = SIZES[i % len(SIZES)]
        images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
        prompts.append(renderer.render(example, images))
    return prompts


def generated(model, inputs, max_tokens):
    """Greedy tokens of transformers, no vision tokens, each row cut after its first end token."""
    suppressed = list(unsampleable_token_ids(model.config)) or None
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens, suppress_tokens=suppressed)
    ends = set(model.generation_config.eos_token_id)
    rows = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in ends), max_tokens)
        rows.append(row[:length])
    return rows


def with_tokens(groups, rows):
    """The groups with other tokens in their only completions, and their own logprobs."""
    completions = (
        dataclasses.replace(group.completions[0], token_ids=np.array(row))
        for group, row in zip(groups, rows, strict=True)
    )
    pairs = zip(groups, completions, strict=True)
    return [dataclasses.replace(group, completions=(completion,)) for group, completion in pairs]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_generate(
    family, tiny_folder, tiny_policy, transformers_model, mixed_prompts, padded_inputs, run_engine
):
    if family in VISION:
        prompts = [*rendered_prompts(tiny_folder(family), 35), *mixed_prompts(family, 30)]
        lengths = {len(prompt.image_inputs["pixel_values"]) for prompt in prompts if prompt.image_inputs}
        assert len(lengths) >= FEWEST_LENGTHS.get(family, 5)
        assert sum(not prompt.image_inputs for prompt in prompts) >= 16
    else:
        prompts = mixed_prompts(family, 65)
    assert len({len(prompt.token_ids) for prompt in prompts}) >= 16
    groups = run_engine(tiny_policy(family), prompts, temperature=0.0, max_tokens=16)
    model, nothing = transformers_model(family), np.zeros(0, dtype=np.int64)
    expected = []
    for start in range(0, len(prompts), 13):
        inputs = padded_inputs(model, [(prompt, nothing) for prompt in prompts[start : start + 13]], "left")
        inputs.pop("position_ids", None)
        expected += generated(model, inputs, 16)
    assert worst_difference(groups, with_tokens(groups, expected), tiny_policy(family)) == 0
    assert {group.completions[0].finish_reason for group in groups} == {"stop", "length"}
    # the models answer to their prompts: otherwise equality would show little
    assert len({tuple(tokens) for tokens in expected}) > len(prompts) // 2


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "side"),
    [
        (1.0, 0, 1.0, "right"),
        (1.0, 0, 1.0, "left"),
        (0.7, 0, 1.0, "left"),
        (1.0, 9, 1.0, "right"),
        (1.3, 0, 0.8, "right"),
        (0.7, 40, 0.9, "left"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_padded_transformers_forward(
    family,
    temperature,
    top_k,
    top_p,
    side,
    tiny_policy,
    transformers_model,
    mixed_prompts,
    run_engine,
    padded_logprobs,
    record_property,
):
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    groups = run_engine(tiny_policy(family), mixed_prompts(family, 9), group_size=3, **sampling)
    rows = [(group.prompt, completion.token_ids) for group in groups for completion in group.completions]
    warpers = LogitsProcessorList([TopKLogitsWarper(top_k)] if top_k else [])
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    with torch.inference_mode():
        model = transformers_model(family)
        expected = padded_logprobs(model, rows, temperature=temperature, warpers=warpers, side=side)
    actual = [completion.rollout_logprobs for group in groups for completion in group.completions]
    worst = max(np.abs(one.numpy() - other).max() for one, other in zip(expected, actual, strict=True))
    record_property("worst", float(worst))
    assert worst <= LOGPROBS / min(1.0, temperature)


def test_greedy_logprobs_are_those_of_temperature_one(
    tiny_policy, transformers_model, mixed_prompts, run_engine, padded_logprobs
):
    groups = run_engine(tiny_policy("qwen2"), mixed_prompts("qwen2", 4), temperature=0.0)
    with torch.inference_mode():
        rows = [(group.prompt, group.completions[0].token_ids) for group in groups]
        expected = torch.cat(padded_logprobs(transformers_model("qwen2"), rows))
    actual = np.concatenate([group.completions[0].rollout_logprobs for group in groups])
    np.testing.assert_allclose(actual, expected.numpy(), atol=LOGPROBS, rtol=0)


def test_in_bfloat16_engine_and_learner_are_no_further_apart_than_the_learner_is_from_float32(
    fresh_policy, mixed_prompts, run_engine, record_property
):
    policy, exact = fresh_policy("qwen2_vl", dtype="bfloat16"), fresh_policy("qwen2_vl")
    with torch.no_grad():
        for parameter, rounded in zip(exact.model.parameters(), policy.model.parameters(), strict=True):
            parameter.copy_(rounded)
    groups = run_engine(policy, mixed_prompts("qwen2_vl", 6), group_size=4)
    items = [PackItem(group.prompt, tuple(TrainSequence(c, 1.0) for c in group.completions)) for group in groups]
    with torch.no_grad():
        batch = pack(items, policy)
        learner_logprobs, _ = packed_logprobs(policy, batch, 1.0)
        exact_logprobs, _ = packed_logprobs(exact, pack(items, exact), 1.0)
    mismatch = (learner_logprobs - batch.rollout_logprobs).abs().mean()
    rounding = (learner_logprobs - exact_logprobs).abs().mean()
    record_property("worst", float(mismatch))
    # the engine is as far from float32 as the learner, and they may be on either side
    assert mismatch < 2 * rounding
