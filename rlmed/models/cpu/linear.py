"""Float32 linear layers on a CPU with the product that `rlmed.models.cpu.products` chose."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from rlmed.models.cpu.products import MIN_ROWS, onednn, pack, uses_onednn


@dataclass(slots=True)
class _Steps:
    """Counts the steps of all optimizers in this process."""

    taken: int = 0

    def count(self, *_: Any) -> None:
        self.taken += 1


_steps = _Steps()
# torch's fused optimizers change a parameter without bumping its version
register_optimizer_step_post_hook(_steps.count)


class PackedWeights:
    """Weight copies in oneDNN's layout, for the many decode steps of one rollout.

    A copy is used only while its weight is the same tensor, at the same address and version, and no
    optimizer has stepped: the next product sees every change of a weight (a step, a load).

    Example:
        >>> packs = PackedWeights()
        >>> with packs.active(): hidden = policy.hidden(...)     # doctest: +SKIP
    """

    def __init__(self) -> None:
        """Start empty."""
        self._packs: dict[int, tuple[Tensor, tuple[int, int, int], Tensor]] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use the copies for products of few rows in this thread, if packed weights were chosen."""
        if not uses_onednn("packed_weights"):
            yield
            return
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def clear(self) -> None:
        """Release the memory."""
        self._packs.clear()

    def __len__(self) -> int:
        return len(self._packs)

    def of(self, weight: Tensor) -> Tensor:
        """Return the packed weight, or the weight itself if a change of it would go unnoticed."""
        if type(weight) is not nn.Parameter or weight.is_inference():
            return weight
        state = (weight.data_ptr(), weight._version, _steps.taken)
        found = self._packs.get(id(weight))
        if found is None or found[0] is not weight or found[1] != state:
            found = self._packs[id(weight)] = (weight, state, pack(weight.detach()))
        return found[2]


_active: ContextVar[PackedWeights | None] = ContextVar("packed weights", default=None)


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def matmul_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias for x [M, K], weight [N, K] and bias [N]; not differentiable, any strides."""
    few = len(x) < MIN_ROWS
    if few and x.numel() and (packs := _active.get()) is not None and _plain(x) and _plain(weight):
        weight = packs.of(weight)
        if weight.is_mkldnn:
            return onednn(x, weight, bias)
    if uses_onednn("few_rows" if few else "many_rows") and _plain(x) and _plain(weight) and x.numel():
        return onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad.T @ x for grad [M, N] and x [M, K]; not differentiable."""
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
    """Return x @ weight.T + bias, [..., N], for x [..., K], weight [N, K] and bias [N]; differentiable."""
    few = x.numel() < MIN_ROWS * x.shape[-1]
    chosen = uses_onednn("few_rows" if few else "many_rows") or uses_onednn("weight_gradients")
    chosen = chosen or (few and _active.get() is not None)
    if not chosen or not _plain(x) or not _plain(weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    # autograd's bookkeeping costs time in every decode step, even if no gradient is wanted
    product = _Linear.apply if torch.is_grad_enabled() else matmul_transposed
    return product(rows, weight, bias).view(*x.shape[:-1], len(weight))


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def use_fast_linears(model: nn.Module) -> None:
    """Make all linear layers of `model` compute with `linear`; parameters and their names stay unchanged."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
