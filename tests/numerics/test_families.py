"""Every vision family from picture to checkpoint: rendered, sampled, learnt, saved, loaded again by
transformers.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from learner.learner import PolicyLearner
from learner.supervised import SupervisedLearner, written_item
from rlmed.cluster.engines import open_model
from rlmed.core.types import Example, ScoredGroup, TrainGroup
from rlmed.data.prompts import PromptRenderer
from rlmed.models.policy import load_config, load_policy
from rlmed.models.size import ModelSize, meta_model
from tests.configs import learner_config, loss_config
from tests.conftest import VISION_FAMILIES
from tests.rounding import LOGPROBS
from tests.tiny_vision import TILE_FAMILIES

UNREAD = {"llava_onevision": {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}}
"""Parameters that the model's output does not depend on."""
SIZES = (((112, 112),), (), ((64, 128), (57, 61)))
"""Of the pictures of a prompt: one, none, two."""


def renderer_of(folder):
    return PromptRenderer(*open_model(folder), max_prompt_tokens=512, template="{question}")


def rendered(renderer):
    prompts = []
    for number, sizes in enumerate(SIZES):
        rng = np.random.default_rng(number)
        images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        example = Example(str(number), None, f"Which part of the body is shown in scan {number}?", ("a", "b"), answer=0)
        prompts.append(renderer.render(example, images))
    return prompts


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_step_moves_every_parameter_and_transformers_loads_the_checkpoint(
    family, tiny_folder, fresh_policy, run_engine, padded_logprobs, tmp_path
):
    policy, renderer = fresh_policy(family), renderer_of(tiny_folder(family))
    groups = run_engine(policy, rendered(renderer), group_size=4, max_tokens=12)
    rewards = np.array([1.0, -1.0, 0.5, -0.5], dtype=np.float32)
    loss = loss_config(kl_coef=0.0, old_logprobs="rollout")
    learner = PolicyLearner(policy, None, loss, learner_config(lr=1e-2), total_steps=5, max_tokens=12, temperature=1.0)
    before = weights(policy.model)
    metrics = learner.step([TrainGroup(ScoredGroup(group, rewards, {}), rewards) for group in groups])
    # the learner's logprobs are the engine's
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=2 * LOGPROBS)
    after = weights(policy.model)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == UNREAD.get(family, set())
    assert {policy.family.part_of(name) for name in before} == {"vision", "merger", "language_model"}
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    learner.save(saved)()
    shutil.rmtree(saved / "optimizer")
    renderer.save(saved)
    loaded = AutoModelForImageTextToText.from_pretrained(saved, attn_implementation="eager").eval()
    assert all(torch.equal(after[name], parameter) for name, parameter in loaded.named_parameters())
    # what was saved is a model: it samples, and transformers computes the same
    again = load_policy(saved)
    groups = run_engine(again, rendered(renderer_of(saved)), group_size=2, max_tokens=12)
    rows = [(group.prompt, completion.token_ids) for group in groups for completion in group.completions]
    with torch.inference_mode():
        expected = torch.cat(padded_logprobs(loaded, rows))
    actual = np.concatenate([completion.rollout_logprobs for group in groups for completion in group.completions])
    np.testing.assert_allclose(actual, expected.numpy(), atol=LOGPROBS, rtol=0)


@pytest.mark.parametrize("family", TILE_FAMILIES)
def test_written_completions_are_learnt(family, tiny_folder, fresh_policy):
    renderer, policy = renderer_of(tiny_folder(family)), fresh_policy(family)
    items = [written_item(prompt, renderer.completion_ids("<answer>A</answer>")) for prompt in rendered(renderer)]
    learner = SupervisedLearner(policy, learner_config(lr=3e-3, lr_schedule="constant"), total_steps=20)
    losses = [learner.step(items)["loss"] for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_sizes_are_known_from_the_configuration_alone(family, tiny_folder, tiny_policy):
    policy, renderer = tiny_policy(family), renderer_of(tiny_folder(family))
    size = ModelSize.of(meta_model(load_config(tiny_folder(family))))
    assert size.parameters == sum(parameter.numel() for parameter in policy.model.parameters())
    assert size.vision is not None
    assert size.decoder.key_values == 2 * policy.kv_shape[1] * policy.kv_shape[2]
    prompt = rendered(renderer)[0]
    tokens = int((prompt.token_ids == policy.model.config.image_token_id).sum())
    values = prompt.image_inputs["pixel_values"].size
    # LLaVA-OneVision ends rows of tiles with a token, and cuts the padding of tiles off
    exact = family != "llava_onevision"
    assert abs(values - tokens * size.patches_per_token * size.patch_values) <= (0 if exact else 0.2 * values)


@pytest.mark.parametrize("family", ["gemma3", "idefics3", "internvl"])
def test_a_processor_that_writes_other_numbers_of_tokens_is_refused(family, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder(family), tmp_path / "model")
    path = folder / "processor_config.json"
    path.write_text(path.read_text().replace(": 4", ": 5"))
    assert 5 in json.loads(path.read_text()).values()
    with pytest.raises(ValueError, match=r"writes \d+ visual tokens .* where the model makes \d+"):
        open_model(folder)
