"""The vision tower's attention in one call a block, and its patches in one product: the same
numbers as in transformers.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

from rlmed.models import vision
from rlmed.models.policy import merge_image_inputs
from rlmed.models.varlen import AttentionChoice
from rlmed.models.varlen_backends import Reference
from rlmed.models.vision import VISION_ATTENTION_NAME, use_linear_patches, use_varlen_vision
from tests.rounding import GRADIENTS, rounding

GRIDS = ((8, 8), (4, 6), (2, 10))
VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
STORED = {"float32": 0.0, "bfloat16": torch.finfo(torch.bfloat16).eps / 2}
"""Relative error of storing a result in this dtype, beside what float32 sums cost."""


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
    output = tower(images["pixel_values"], grid_thw=images["image_grid_thw"])
    features = torch.cat([output.pooler_output, *output.get("deepstack_features", ())])
    (features * torch.linspace(-1, 1, features.shape[1])).sum().backward()
    return features.detach(), {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}


@pytest.mark.parametrize("family", VISION)
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


class Convolutions(TorchDispatchMode):
    """Collects the names of all convolutions, forwards and backwards."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("family", VISION)
def test_no_convolution_runs(family, dtype, fresh_policy, make_prompt, tiny_folder):
    policy = fresh_policy(family, dtype=dtype)
    images = policy.image_inputs(make_prompt(family, 0, length=4, grid=(8, 8)))
    with Convolutions() as found:
        features_and_gradients(policy, images)
    assert found.names == []
    policy.model = AutoModelForImageTextToText.from_pretrained(tiny_folder(family), dtype=policy.dtype)
    with Convolutions() as found:
        features_and_gradients(policy, images)
    assert found.names == ["aten::convolution", "aten::convolution_backward"]


def embedded(module, patches, dtype):
    """[N, D] embeddings, and the gradient [D, C, T, P, P] of the weight."""
    module.zero_grad()
    output = module.to(dtype)(patches.to(dtype))
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(torch.bfloat16)
    (output * weights).sum().backward()
    return output.detach().double(), module.proj.weight.grad.double()


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_as_near_to_the_definition_as_the_convolution(dtype, bias):
    torch.manual_seed(0)
    size = 2 * 14 * 14 * 3
    convolution = PatchEmbed(embed_dim=320).bfloat16()
    convolution.proj = nn.Conv3d(3, 320, (2, 14, 14), (2, 14, 14), bias=bias).bfloat16()
    patches = torch.randn(40, size).bfloat16()
    product = nn.ModuleList([PatchEmbed(embed_dim=320)])
    product[0].proj = nn.Conv3d(3, 320, (2, 14, 14), (2, 14, 14), bias=bias)
    product.load_state_dict({f"0.{name}": tensor for name, tensor in convolution.state_dict().items()})
    use_linear_patches(product)
    assert product.state_dict().keys() == {f"0.{name}" for name in convolution.state_dict()}
    kind = getattr(torch, dtype)
    ours, theirs = embedded(product[0], patches, kind), embedded(convolution, patches, kind)
    right = embedded(convolution, patches, torch.float64)
    # the rows' and weights' absolute values, for the sums' magnitude
    magnitude = float((patches.double().abs() @ convolution.proj.weight.detach().flatten(1).abs().T).max()) + 1
    for one, other, exact, length in zip(ours, theirs, right, (size, len(patches)), strict=True):
        bound = rounding(length, magnitude) + STORED[dtype] * exact.abs()
        assert ((one - exact).abs() <= bound).all()
        if dtype == "bfloat16":
            # without instructions for bfloat16, torch's convolution rounds each partial sum
            bound = bound + STORED[dtype] * length * magnitude
        assert ((other - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("family", VISION)
def test_transformers_loads_the_saved_weights_and_computes_the_same(family, dtype, fresh_policy, make_prompt, tmp_path):
    policy = fresh_policy(family, dtype=dtype)
    policy.model.save_pretrained(tmp_path)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=policy.dtype)
    expected = theirs.state_dict()
    assert {name: tensor.shape for name, tensor in policy.model.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in policy.model.named_parameters())
    images = policy.image_inputs(make_prompt(family, 0, length=4, grid=(8, 8)))
    with torch.no_grad():
        ours, own = (
            model.base_model.visual.patch_embed(images["pixel_values"]).double() for model in (policy.model, theirs)
        )
    weight = theirs.base_model.visual.patch_embed.proj.weight.detach().double().flatten(1)
    magnitude = float((images["pixel_values"].double().abs() @ weight.abs().T).max())
    # each is stored, and a float32 sum of so many products
    bound = rounding(weight.shape[1], magnitude) + 2 * STORED[dtype] * own.abs()
    assert ((ours - own).abs() <= bound).all()


def test_a_patch_embedding_that_computes_more_stays():
    class Positioned(PatchEmbed):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    model = nn.ModuleList([Positioned(embed_dim=8), PatchEmbed(embed_dim=8)])
    use_linear_patches(model)
    assert ["forward" in vars(module) for module in model] == [False, True]
