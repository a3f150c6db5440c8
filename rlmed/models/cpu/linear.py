"""Float32 linear layers on a CPU with the product that `rlmed.models.cpu.products` chose."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from rlmed.models.cpu.products import MIN_ROWS, onednn, onednn_with, pack, uses_onednn

Made = TypeVar("Made")


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
        self._packs: dict[tuple[int, ...], tuple[tuple[Tensor, ...], tuple[tuple[int, int, int], ...], Any]] = {}

    @contextmanager
    def active(self, *, products: bool = True) -> Iterator[None]:
        """Use the copies in this thread: those of compiled steps and, with `products`, oneDNN's.

        oneDNN's are for products of few rows.
        """
        token = _active.set((self, products))
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
        packed = self.joined(weight)
        return weight if packed is None else packed

    def joined(self, *parameters: Tensor) -> Tensor | None:
        """Return the weights [N_i, K] packed as one [sum of N_i, K], or the biases [N_i] joined.

        None if a change of one would go unnoticed.
        """
        if not all(map(notices_changes, parameters)):
            return None

        def make() -> Tensor:
            joined = torch.cat([one.detach() for one in parameters]) if len(parameters) > 1 else parameters[0].detach()
            return pack(joined) if joined.ndim > 1 else joined

        return self.made(parameters, make)

    def made(self, parameters: tuple[Tensor, ...], make: Callable[[], Made]) -> Made:
        """Return what `make` returned for these parameters; call it again after any change of them.

        The parameters are such that `notices_changes`.
        """
        key = tuple(map(id, parameters))
        states = tuple((one.data_ptr(), one._version, _steps.taken) for one in parameters)
        found = self._packs.get(key)
        if found is not None and found[1] == states and all(map(operator.is_, found[0], parameters)):
            made: Made = found[2]
            return made
        made = make()
        self._packs[key] = (parameters, states, made)
        return made


def notices_changes(tensor: Tensor) -> bool:
    """Return whether a change of its numbers shows in its version or in an optimizer's steps."""
    return type(tensor) is nn.Parameter and not tensor.is_inference()


_active: ContextVar[tuple[PackedWeights, bool] | None] = ContextVar("packed weights", default=None)


def current_packs() -> PackedWeights:
    """Return the copies that are active in this thread, or new ones."""
    active = _active.get()
    return PackedWeights() if active is None else active[0]


def _packs() -> PackedWeights | None:
    """Return the active copies for oneDNN, if it was chosen for packed weights."""
    active = _active.get()
    return active[0] if active is not None and active[1] and uses_onednn("packed_weights") else None


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _onednn_operand(x: Tensor, weight: Tensor) -> Tensor | None:
    """Return the weight as oneDNN takes it for x [M, K]; None: torch's product."""
    if not _plain(x) or not _plain(weight) or not x.numel():
        return None
    few = len(x) < MIN_ROWS
    if few and (packs := _packs()) is not None:
        packed = packs.of(weight)
        if packed.is_mkldnn:
            return packed
    return weight if uses_onednn("few_rows" if few else "many_rows") else None


def matmul_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias: x [M, K], weight [N, K], bias [N], any strides; no gradient."""
    operand = _onednn_operand(x, weight)
    return F.linear(x, weight, bias) if operand is None else onednn(x, operand, bias)


def matmul_joined(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> Tensor | None:
    """Return several layers' x @ weight.T + bias as one product [M, sum of N_i], or None.

    `biases` may be empty. Not differentiable.
    """
    packs = _packs()
    if packs is None or len(x) >= MIN_ROWS or not _plain(x) or not all(map(_plain, weights)):
        return None
    weight, bias = packs.joined(*weights), packs.joined(*biases) if biases else None
    return None if weight is None or (biases and bias is None) else onednn(x, weight, bias)


def matmul_silu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return silu(x @ weight.T + bias), see `matmul_transposed`."""
    operand = _onednn_operand(x, weight)
    # with many rows, oneDNN's product takes longer with another operation than both one after the
    # other
    if operand is None or len(x) >= MIN_ROWS:
        return F.silu(matmul_transposed(x, weight, bias), inplace=True)
    return onednn(x, operand, bias, then="swish")


def matmul_times(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
    """Return (x @ weight.T + bias) * factor; may overwrite `factor` [M, N] with it."""
    operand = _onednn_operand(x, weight)
    if operand is None or len(x) >= MIN_ROWS:
        return factor.mul_(matmul_transposed(x, weight, bias))
    return onednn_with(x, operand, bias, factor, "mul")


def matmul_plus(x: Tensor, weight: Tensor, bias: Tensor | None, term: Tensor) -> Tensor:
    """Return x @ weight.T + bias + term; may overwrite `term` [M, N] with it."""
    operand = _onednn_operand(x, weight)
    if operand is None and bias is None:
        return term.addmm_(x, weight.T)
    if operand is None or len(x) >= MIN_ROWS:
        return term.add_(matmul_transposed(x, weight, bias))
    return onednn_with(x, operand, bias, term, "add")


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
    """Return differentiable x @ weight.T + bias, [..., N]: x [..., K], weight [N, K], bias [N]."""
    few = x.numel() < MIN_ROWS * x.shape[-1]
    chosen = uses_onednn("few_rows" if few else "many_rows") or uses_onednn("weight_gradients")
    chosen = chosen or (few and _packs() is not None)
    if not chosen or not _plain(x) or not _plain(weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    # autograd's bookkeeping costs time in every decode step, even if no gradient is wanted
    product = _Linear.apply if torch.is_grad_enabled() else matmul_transposed
    return product(rows, weight, bias).view(*x.shape[:-1], len(weight))


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def use_fast_linears(model: nn.Module) -> None:
    """Make all linear layers of `model` compute with `linear`; parameters and names stay as is."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
