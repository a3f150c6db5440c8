"""The vision tower's attention in one call a block: same numbers as with a call for every image or window."""

from __future__ import annotations

import pytest
import torch

from rlmed.models import vision
from rlmed.models.policy import merge_image_inputs
from rlmed.models.varlen import AttentionChoice
from rlmed.models.varlen_backends import Reference
from rlmed.models.vision import VISION_ATTENTION_NAME, use_varlen_vision
from tests.rounding import GRADIENTS

GRIDS = ((8, 8), (4, 6), (2, 10))


class Counting(Reference):
    """Remembers the number of sequences and the longest of each call."""

    def __init__(self):
        self.calls = []

    def forward(self, row, spans, scale):
        assert spans.query_starts.dtype == torch.int32
        assert not spans.causal
        self.calls.append((len(spans.query_starts) - 1, spans.longest_query))
        return super().forward(row, spans, scale)


def features_and_gradients(policy, images):
    """The tower's output for the images, and the gradient of each of its parameters."""
    tower = policy.model.base_model.visual
    tower.zero_grad()
    features = tower(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
    (features * torch.linspace(-1, 1, features.shape[1])).sum().backward()
    return features.detach(), {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_one_call_a_block_gives_the_features_and_gradients_of_a_call_for_every_image(
    family, fresh_policy, make_prompt, monkeypatch
):
    policy = fresh_policy(family)
    prompts = [make_prompt(family, index, length=4, grid=grid) for index, grid in enumerate(GRIDS)]
    images = merge_image_inputs([policy.image_inputs(prompt) for prompt in prompts])
    expected, expected_gradients = features_and_gradients(policy, images)
    backend = Counting()
    monkeypatch.setattr(vision, "choose_attention", lambda *_: AttentionChoice(backend, "installed"))
    use_varlen_vision(policy.model)
    found, found_gradients = features_and_gradients(policy, images)
    torch.testing.assert_close(found, expected, atol=GRADIENTS * float(expected.abs().max()), rtol=0)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, atol=GRADIENTS * float(gradient.abs().max()), rtol=0, msg=name
        )
    tower = policy.model.base_model.visual
    assert len(backend.calls) == len(tower.blocks)
    # where they are one, transformers reads the longest image from the device once, not in every
    # block
    assert all(block.attn.config is tower.config for block in tower.blocks)
    assert (len(GRIDS), 64) in backend.calls  # all of each image


def test_without_a_backend_the_tower_keeps_its_attention(fresh_policy):
    policy = fresh_policy("qwen2_5_vl")  # load_policy has asked for a CPU
    assert policy.model.config.vision_config._attn_implementation == "sdpa"


def test_the_name_reaches_the_tower_alone_and_no_checkpoint(fresh_policy, monkeypatch, tmp_path):
    policy = fresh_policy("qwen2_vl")
    monkeypatch.setattr(vision, "choose_attention", lambda *_: AttentionChoice(Reference(), "installed"))
    use_varlen_vision(policy.model)
    config = policy.model.config
    assert config.vision_config._attn_implementation == VISION_ATTENTION_NAME
    assert config.get_text_config()._attn_implementation == "shared_prefix"
    policy.model.save_pretrained(tmp_path)
    assert VISION_ATTENTION_NAME not in (tmp_path / "config.json").read_text()
