"""A linear layer with a low-rank adapter as one function of autograd: y = x W' + bias + s x A' B'.

peft computes the same by five operations, of which four make a tensor as wide as the output. Three
of them are freed at once, between tensors that the backward pass needs; on a CPU the C library
finds no use for many of these gaps, and a step took twice the memory of its tensors
(docs/memory.md). Here the adapter's product is added to the layer's own in place.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlmed.models.cpu.linear import matmul_transposed, weight_gradient


class _Adapted(torch.autograd.Function):
    """The layer's output on rows x [M, K]; the weight is frozen.

    With g = dy: dA = s (g B)' x, dB = s g' (x A'), dx = g W + s (g B) A. With dropout A reads
    `dropped` in place of x, and the last term is its own gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        read = x if dropped is None else dropped
        inner = matmul_transposed(read, a)
        ctx.save_for_backward(read, inner, weight, a, b)
        ctx.apart, ctx.scale = dropped is not None, scale
        return matmul_transposed(x, weight, bias).addmm_(inner, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, inner, weight, a, b = ctx.saved_tensors
        grad_inner = (grad @ b).mul_(ctx.scale)
        grad_a = weight_gradient(grad_inner, read)
        grad_b = weight_gradient(grad, inner).mul_(ctx.scale)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = matmul_transposed(grad, weight.T)
        if ctx.apart and ctx.needs_input_grad[1]:
            grad_dropped = grad_inner @ a
        elif grad_x is not None:
            grad_x.addmm_(grad_inner, a)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


_adapted: Callable[[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor, float], Tensor] = _Adapted.apply


def use_one_function(layer: Any, name: str) -> None:
    """Let a LoRA layer of peft compute as above with its adapter `name`, if it is a plain linear.

    Its parameters and their names stay as they are.
    """
    if type(layer.base_layer) is not nn.Linear:
        return

    def forward(module: Any, x: Tensor) -> Tensor:
        base = module.base_layer
        if module.disable_adapters:
            output: Tensor = base(x)
            return output
        rows, dropout = x.reshape(-1, x.shape[-1]), module.lora_dropout[name]
        dropped = dropout(rows) if module.training and not isinstance(dropout, nn.Identity) else None
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        return _adapted(rows, dropped, base.weight, base.bias, a, b, module.scaling[name]).view(*x.shape[:-1], len(b))

    layer.forward = types.MethodType(forward, layer)
