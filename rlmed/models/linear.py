"""Float32 linear layers on a CPU through the product that `rlmed.models.products` has chosen."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlmed.models.products import MIN_ROWS, onednn, uses_onednn


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def matmul_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x [M, K], weight [N, K] and bias [N]; not differentiable, strides are free."""
    use = "few_rows" if len(x) < MIN_ROWS else "many_rows"
    if uses_onednn(use) and _plain(x) and _plain(weight) and x.numel():
        return onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x for grad [M, N] and x [M, K]; not differentiable."""
    if uses_onednn("weight_gradients") and _plain(grad) and _plain(x) and x.numel():
        return onednn(grad.T, x.T)
    return grad.T @ x


class _Linear(torch.autograd.Function):
    """y = x @ weight.T + bias on rows [M, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return matmul_transposed(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = matmul_transposed(grad, weight.T) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(dim=0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x [..., K], weight [N, K] and bias [N] give [..., N]; differentiable."""
    few = x.numel() < MIN_ROWS * x.shape[-1]
    chosen = uses_onednn("few_rows" if few else "many_rows") or uses_onednn("weight_gradients")
    if not chosen or not _plain(x) or not _plain(weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    # autograd's own bookkeeping costs time in every decode step, also where no gradient is wanted
    product = _Linear.apply if torch.is_grad_enabled() else matmul_transposed
    return product(rows, weight, bias).view(*x.shape[:-1], len(weight))


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def use_fast_linears(model: nn.Module) -> None:
    """Let all linear layers of `model` compute through `linear`; their parameters and names stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = types.MethodType(_forward, module)
