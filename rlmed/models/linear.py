"""Float32 linear layers on an AMD processor through oneDNN.

torch multiplies float32 matrices with MKL, which on AMD processors was slower than oneDNN, a part of torch, for outputs and
input gradients of many rows (measured on both makes: docs/lab-log.md). The numbers agree to rounding. Everywhere else, for
weight gradients, for few rows and on Intel's processors, torch's own product is as fast or faster, and is used.
"""

from __future__ import annotations

import platform
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cpu_vendor() -> str:
    """The processor's make as it names itself, for example "AuthenticAMD" or "GenuineIntel"; "" where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        # Windows: "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD"
        return platform.processor().rpartition(", ")[2]
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


MIN_ROWS = 128
"""Below, as when tokens are decoded, the two are equally fast and torch's own has the shorter way."""

_AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and cpu_vendor() == "AuthenticAMD"
)


def suits_onednn(tensor: Tensor) -> bool:
    """True for float32 tensors on an AMD processor, where torch has oneDNN."""
    return _AVAILABLE and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def matmul_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x [M, K], weight [N, K] and bias [N]; not differentiable, strides are free."""
    if suits_onednn(x) and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


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
        grad_weight = grad.T @ x if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(dim=0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x [..., K], weight [N, K] and bias [N] give [..., N]; differentiable."""
    few = x.numel() < MIN_ROWS * x.shape[-1]
    if few or not suits_onednn(x) or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    # autograd's own bookkeeping costs time in every decode step, also where no gradient is wanted
    product = _Linear.apply if torch.is_grad_enabled() else matmul_transposed
    return product(rows, weight, bias).view(*x.shape[:-1], len(weight))


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def use_fast_linears(model: nn.Module) -> None:
    """Let all linear layers of `model` compute through `linear`; their parameters and names stay as they are."""
    if not _AVAILABLE:
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = types.MethodType(_forward, module)
