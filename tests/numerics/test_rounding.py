"""Where `tests/rounding.py`'s bounds come from: float32's rounding on test models, in float64.

Every product of matrices is off by a random number of the size that its partial sums' rounding has
(for sums of numbers of both signs, eps/2 times the sum of absolute values whatever the length:
Higham and Mary, SIAM J. Sci. Comput. 42, 2020), every elementary function by half a unit in the
last place; forwards and backwards. This asks no processor how it adds.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.rounding import ADAM_EPS, LARGEST_WEIGHT, LOGPROBS, gradient_bound, rounding, updates_apart

pytestmark = pytest.mark.slow

HALF_UNIT = rounding(0.5)
SAFETY = 2
"""Two computations are each off, and other data may fare worse: √2 times √2 as much."""
LR, UPDATES = 3e-4, 8
"""As many smooth updates, and as large ones, as tests compare the weights of."""
ELEMENTARY = {
    "add", "sub", "mul", "div", "pow", "mean", "rsqrt", "softmax", "log_softmax", "silu", "gelu", "layer_norm", "cos", "sin",
}  # fmt: skip


class Product(torch.autograd.Function):
    """a @ b whose value and gradients are off as if they had been added up in float32."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, random: torch.Generator) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.random = random
        return rounded_product(a, b, random)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        return rounded_product(grad, b.mT, ctx.random), rounded_product(a.mT, grad, ctx.random), None


def rounded_product(a: Tensor, b: Tensor, random: torch.Generator) -> Tensor:
    exact = a @ b
    noise = torch.randn(exact.shape, generator=random, dtype=exact.dtype)
    return exact + HALF_UNIT * noise * (a.abs() @ b.abs())


class Float32Rounding(TorchFunctionMode):
    """A float64 computation that is off at every step as one in float32 may be."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)
        self.seen: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.__name__, kwargs or {}
        self.seen.add(name)
        with torch._C.DisableTorchFunction():
            if name == "linear":
                x, weight, bias = (*args, kwargs.get("bias"))[:3]
                y = Product.apply(x.reshape(-1, x.shape[-1]), weight.T, self.random).view(*x.shape[:-1], -1)
                return y if bias is None else y + bias
            if name == "matmul":
                return Product.apply(*args, self.random)
            if name == "conv3d":  # of patches that do not overlap: one product a patch
                return Product.apply(args[0].flatten(1), args[1].flatten(1).T, self.random).view(
                    len(args[0]), -1, 1, 1, 1
                )
            result = function(*args, **kwargs)
            if name in ELEMENTARY and result.is_floating_point():
                noise = torch.randn(result.shape, generator=self.random, dtype=result.dtype)
                return result * (1 + HALF_UNIT * noise)
            return result


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava_onevision", "qwen2", "qwen3", "llama"])
def test_float32_moves_logprobs_and_gradients_by_less_than_the_bounds(
    family, transformers_model, make_train_groups, padded_logprobs, worst_relative, record_property
):
    groups = [group.rollout for group in make_train_groups(family, 4)]
    rows = [(group.prompt, completion.token_ids) for group in groups for completion in group.completions]
    model = transformers_model(family).double()
    tokens = sum(len(token_ids) for _, token_ids in rows)
    weights = torch.randn(tokens, generator=torch.Generator().manual_seed(0)).double() / tokens

    def compute() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logprobs = torch.cat(padded_logprobs(model, rows))
        (logprobs * weights).sum().backward()
        # some towers have a last norm that nothing reads
        read = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return logprobs.detach(), {name: gradient.clone() for name, gradient in read.items()}

    logprobs, gradients = compute()
    assert logprobs.dtype == torch.float64
    for seed in range(2):
        with Float32Rounding(seed) as mode:
            found_logprobs, found_gradients = compute()
        assert {"linear", "matmul", "softmax", "rsqrt", "silu"} <= mode.seen
        worst = float((found_logprobs - logprobs).abs().max())
        worst_gradient, _ = worst_relative(found_gradients, gradients)
        record_property("worst", (worst, worst_gradient))
        assert 1e-7 < worst < LOGPROBS / SAFETY
        assert 1e-7 < worst_gradient < gradient_bound(family) / SAFETY


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen2", "llama"])
def test_float32_moves_weights_by_less_than_the_bound_of_smooth_updates(
    family, transformers_model, make_train_groups, padded_logprobs, record_property
):
    """Updates start at weights already apart; the bound's formula leaves that out, not so here."""
    groups = [group.rollout for group in make_train_groups(family, 2)]
    rows = [(group.prompt, completion.token_ids) for group in groups for completion in group.completions]
    signals = torch.randn(
        UPDATES, sum(len(ids) for _, ids in rows), generator=torch.Generator().manual_seed(0)
    ).double()

    def trained(mode: contextlib.AbstractContextManager[Any], *, stored: torch.dtype) -> dict[str, Tensor]:
        model = transformers_model(family).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=ADAM_EPS, weight_decay=0.0)
        for signal in signals:
            optimizer.zero_grad()
            with mode:
                (torch.cat(padded_logprobs(model, rows)) * signal).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.to(stored).double()
        return {name: weight.detach() for name, weight in model.named_parameters()}

    def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return max(float((weight - other[name]).abs().max()) for name, weight in one.items())

    exact = trained(contextlib.nullcontext(), stored=torch.float64)
    rounded = trained(Float32Rounding(0), stored=torch.float32)
    start = {name: weight.detach() for name, weight in transformers_model(family).double().named_parameters()}
    bound = updates_apart(LR, UPDATES)
    record_property("worst", (apart(exact, rounded) / bound, apart(exact, start)))
    assert max(float(weight.abs().max()) for weight in start.values()) < LARGEST_WEIGHT
    assert 1e-10 < apart(exact, rounded) < bound / SAFETY
    assert apart(exact, start) > 20 * bound
