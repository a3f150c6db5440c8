"""The fused layers give the numbers and gradients of the layers that they stand in for."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2_vl import modeling_qwen2_vl

from rlmed.models.cpu import fused
from rlmed.models.tiny.toy import SHIPPED
from tests.rounding import rounding

ROUNDING = rounding(24, 10)
"""Two dozen operations forwards, backwards, sums of 8 or 15 among them; values seldom above 10."""
BASE = SHIPPED / "tiny_base"


def assert_same(actual, expected, inputs) -> None:
    """Equal values, and equal gradients of a random projection."""
    torch.testing.assert_close(actual, expected, atol=ROUNDING, rtol=0)
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(7))
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=ROUNDING, rtol=0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 8), (1, 7, 8), (1, 3, 4, 8), (0, 8)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(8, seed=1)
    norm = modeling_qwen2.Qwen2RMSNorm(8, eps=1e-3)
    norm.weight = nn.Parameter(weight.detach().clone())
    expected = norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))
    torch.testing.assert_close(norm(x), expected, atol=ROUNDING, rtol=0)
    assert_same(
        fused.rms_norm(x, weight, 1e-3), weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)), (x, weight)
    )
    with torch.no_grad():
        torch.testing.assert_close(fused.rms_norm(x, weight, 1e-3), expected, atol=ROUNDING, rtol=0)


def test_rms_norm_of_a_transposed_gradient() -> None:
    x, weight = random(3, 4, 8), random(8, seed=1)
    assert_same(
        fused.rms_norm(x, weight, 1e-6).transpose(0, 1),
        (weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))).transpose(0, 1),
        (x, weight),
    )


def test_swiglu() -> None:
    gate, up = random(2, 5, 8), random(2, 5, 8, seed=1)
    assert_same(fused.swiglu(gate, up), nn.functional.silu(gate) * up, (gate, up))
    before = gate.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(fused.swiglu(gate, up), nn.functional.silu(gate) * up, atol=ROUNDING, rtol=0)
    assert torch.equal(gate, before)


def test_rotary() -> None:
    query, key = random(1, 4, 6, 8), random(1, 2, 6, 8, seed=1)
    angles = torch.rand(1, 6, 4).repeat(1, 1, 2) * 6
    cos, sin = angles.cos(), angles.sin()

    def plain(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    for actual, x in zip(fused.rotary(query, key, cos, sin), (query, key), strict=True):
        assert_same(actual, plain(x), (x,))
    with torch.no_grad():
        for actual, x in zip(fused.rotary(query, key, cos, sin), (query, key), strict=True):
            torch.testing.assert_close(actual, plain(x), atol=ROUNDING, rtol=0)


def replaced(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def test_a_models_layers_are_replaced_and_its_parameters_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_qwen2_vl, "apply_rotary_pos_emb", modeling_qwen2_vl.apply_rotary_pos_emb)
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32)
    names = list(model.state_dict())
    fused.use_fused_layers(model)
    assert replaced(model) == {"Qwen2VLRMSNorm", "Qwen2MLP"}
    assert list(model.state_dict()) == names
    function = modeling_qwen2_vl.apply_rotary_pos_emb
    fused.use_fused_layers(model)
    assert modeling_qwen2_vl.apply_rotary_pos_emb is function, "a second model must not wrap it once more"


def test_a_layer_of_the_same_shape_that_computes_something_else_stays() -> None:
    class ShiftedNorm(modeling_qwen2.Qwen2RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)

    gelu = modeling_qwen2.Qwen2MLP(Qwen2Config(hidden_size=8, intermediate_size=16, hidden_act="gelu"))
    model = nn.ModuleList([ShiftedNorm(8), gelu])
    fused.use_fused_layers(model)
    assert replaced(model) == set()


def test_a_rotation_of_neighbours_instead_of_halves_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        return q.flip(-1), k.flip(-1)

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", apply_rotary_pos_emb, raising=False)
    fused._use_fused_rotary(module)
    assert module.apply_rotary_pos_emb is apply_rotary_pos_emb


def test_other_types_go_through_the_layers_own_code() -> None:
    norm = modeling_qwen2.Qwen2RMSNorm(8)
    model = nn.ModuleList([norm])
    x = torch.randn(3, 8).bfloat16()
    expected = modeling_qwen2.Qwen2RMSNorm(8).bfloat16()(x)
    fused.use_fused_layers(model)
    assert replaced(model) == {"Qwen2RMSNorm"}
    assert torch.equal(model.bfloat16()[0](x), expected)
