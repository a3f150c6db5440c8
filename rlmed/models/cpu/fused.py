"""Norms, gates and rotary embeddings with fewer passes over memory, float32 on CPUs.

On a CPU these element-wise parts of a small decoder cost as much as its matrix products, because
autograd stores and reads one tensor per operation. Here the derivative is explicit (each docstring
has its formula) and works in place. A part of a model is replaced only if a probe shows that it
computes the same function; no list of model names decides.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """y = w * x̂, x̂ = x / rms(x) (Zhang and Sennrich 2019).

    Then dx = (w g - x̂ mean(w g x̂)) / rms, and dw = sum over rows of g x̂.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normal, inverse_rms = _normalise(x, epsilon)
        ctx.save_for_backward(x, weight, inverse_rms)
        return normal.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        normal = x * inverse_rms
        products = grad * normal
        grad_weight = products.reshape(-1, len(weight)).sum(dim=0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        means = (products @ weight).unsqueeze(-1).div_(len(weight))
        grad_x = torch.mul(grad, weight, out=products).sub_(normal.mul_(means)).mul_(inverse_rms)
        return grad_x, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    """y = silu(gate) * up (Shazeer 2020); saves only gate and up for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, F.silu(gate).mul_(grad)


class _Rotation(torch.autograd.Function):
    """Rotation of rotary embeddings (Su et al. 2021); its derivative is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


# torch leaves `apply` untyped
_normed: Callable[[Tensor, Tensor, float], Tensor] = _RMSNorm.apply
_gated: Callable[[Tensor, Tensor], Tensor] = _SwiGLU.apply
_rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = _Rotation.apply


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """Return x cos + rotate_half(x) sin, where rotate_half turns [a, b] into [-b, a]."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return turned


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by cos and sin whose halves are equal; differentiable.

    The shapes are [B, heads, L, D] and, of cos and sin, [B, L, D].
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if torch.is_grad_enabled():
        return _rotate(query, cos, sin), _rotate(key, cos, sin)
    return _rotated(query, cos, sin, 1.0), _rotated(key, cos, sin, 1.0)


def _normalise(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) over the last dimension, and 1 / rms(x) [..., 1]."""
    inverse_rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return x * inverse_rms, inverse_rms


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Apply root-mean-square norm to float32 x [..., K] with weight [K]; differentiable."""
    if torch.is_grad_enabled():
        return _normed(x, weight, epsilon)
    return _normalise(x, epsilon)[0].mul_(weight)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for two float32 tensors of the same shape; differentiable."""
    return _gated(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def _plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def use_fused_layers(model: nn.Module) -> None:
    """Replace the parts of `model` that this module implements; parameters and names stay as is.

    Layers are replaced in this model only; the rotary embedding is a function in transformers'
    modelling module and is replaced there, for all models of the architecture.
    """
    for module in model.modules():
        replacement = _replacement(module)
        if replacement and _same_function(module, replacement):
            module.forward = types.MethodType(_where_plain(replacement), module)
    for name in {type(module).__module__ for module in model.modules() if hasattr(module, "q_proj")}:
        _use_fused_rotary(sys.modules[name])


def _replacement(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """Return the fused forward of a layer that looks like a norm or a gated MLP; else None."""
    parameters = dict(module.named_parameters(recurse=False))
    if list(parameters) == ["weight"] and parameters["weight"].ndim == 1 and hasattr(module, "variance_epsilon"):
        return lambda layer, x: rms_norm(x, layer.weight, layer.variance_epsilon)
    if all(isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
        return lambda layer, x: layer.down_proj(swiglu(layer.gate_proj(x), layer.up_proj(x)))
    return None


@torch.no_grad()
def _same_function(module: nn.Module, replacement: Callable[[Any, Tensor], Tensor]) -> bool:
    """Return whether both give the same numbers, up to rounding, on two random rows."""
    weight = next(module.parameters())
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    probe = torch.randn(2, weight.shape[-1], generator=_generator())
    return _close(module(probe), replacement(module, probe))


def _use_fused_rotary(modelling: types.ModuleType) -> None:
    """Replace `apply_rotary_pos_emb` in a transformers modelling module if it is the usual one."""
    original = getattr(modelling, "apply_rotary_pos_emb", None)
    usual = ["q", "k", "cos", "sin", "unsqueeze_dim"]
    if original is None or original.__module__ == __name__ or list(inspect.signature(original).parameters) != usual:
        return

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        same_dtype = q.dtype == k.dtype == cos.dtype == sin.dtype
        function = rotary if _plain(q) and same_dtype else original
        return function(q, k, cos, sin, unsqueeze_dim)

    generator = _generator()
    query, key = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 4, generator=generator).repeat(1, 1, 2) for _ in range(2))
    expected, actual = original(query, key, cos, sin), rotary(query, key, cos, sin)
    if all(_close(*pair) for pair in zip(expected, actual, strict=True)):
        modelling.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _close(expected: Tensor, actual: Tensor) -> bool:
    return expected.shape == actual.shape and torch.allclose(expected, actual, rtol=1e-4, atol=1e-5)


def _where_plain(fused: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Use the fused forward for float32 on a CPU, else the layer's own (moved model, autocast)."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        return fused(layer, x) if _plain(x) else type(layer).forward(layer, x)

    return forward
