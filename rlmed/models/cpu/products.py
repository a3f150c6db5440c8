"""Choose the library for float32 products on this CPU: torch's own (usually MKL) or its oneDNN.

Neither is faster everywhere: on some processors oneDNN takes half the time, on others just as long.
So a short probe with the model's own shapes decides, separately for each use. The results agree to
rounding, not bit for bit: all processes of a run share one choice, which the run records in
versions.json and reuses on resume.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from rlmed.core.config.checks import PRODUCT_USES
from rlmed.core.process.display import address_limit
from rlmed.core.process.threads import memory_limit

MIN_ROWS = 128
"""Products of fewer rows, as in decoding, are a use of their own."""
MARGIN = 0.9
"""Choose oneDNN only if it takes at most this share of torch's time: noise must not decide."""
PACKED_FOR_ROWS = 64
"""Rows for which weights are packed; constant, since a result's bits may depend on the layout."""
PACKED_STEPS = 64
"""Decode steps within which packing must pay off."""
PACKED_SHARE = 0.25
"""Largest share of the machine's memory for the packed weights of all engines."""
STEP_BYTES = 256 * 2**20
"""Weights in the decoding probe: too many for caches, so they come from memory as a model's do."""
STEP_SHARE = 1 / 32
"""Largest share of the machine's memory for these weights; packed copies take as much again."""
STEP_ROWS, STEP_SECONDS = 32, 0.1
"""Completions in that probe, between a batch's start and its stragglers; its time per side.

At 16 rows the sides can be closer than `MARGIN`, and noise decides for the 64 of most steps.
"""
_ROWS, _NUMBERS, _SECONDS = 256, 2**19, 0.008
"""Other probes: rows, numbers per weight (first outputs of larger ones), time per shape and side.

With this many rows per weight, it does not matter where the weight comes from.
"""

Product = Callable[[Tensor, Tensor], Tensor]
_Side = Callable[[Tensor, Tensor, Tensor], object]
"""Computation on rows [M, K], a weight [N, K] and the gradient [M, N] of their product."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a linear layer and the number of layers with these sizes."""

    outputs: int
    inputs: int
    layers: int = 1


@functools.cache
def has_onednn() -> bool:
    """Return whether torch's oneDNN product exists and is correct here, also for packed weights."""
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    x, weight = torch.ones(2, 16), torch.ones(32, 16)  # sums of ones are exact
    try:
        product = x @ weight.T
        return all(
            torch.equal(onednn(x, one), product)
            and torch.equal(onednn_with(x, one, None, product, "add"), product + product)
            and torch.equal(onednn_with(x, one, None, product, "mul"), product * product)
            for one in (weight, pack(weight))
        )
    except RuntimeError:
        return False


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """Return oneDNN's x @ weight.T + bias for float32 [M, K], [N, K] and [N] of any strides.

    `then` names a function of each number: "swish" is x * sigmoid(x).
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")
    return product


def onednn_with(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, how: str) -> Tensor:
    """Return the product of `onednn` plus ("add") or times ("mul") `other` [M, N]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, how)
    return product


def pack(weight: Tensor) -> Tensor:
    """Copy a float32 weight [N, K] into oneDNN's layout, for `onednn` only."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
    return packed


class _Choice:
    """Uses for which this process calls oneDNN; None until decided."""

    uses: frozenset[str] | None = None


def uses_onednn(use: str) -> bool:
    """Return whether this process uses oneDNN for this use (one of `PRODUCT_USES`) of products."""
    return use in (_Choice.uses or ())


def settle_products(
    config: PreTrainedConfig, uses: Iterable[str] | None = None, *, engines: int = 1
) -> tuple[str, ...]:
    """Decide once per process, by `uses` or else the first probe; return oneDNN's uses in order.

    `engines` is the number of engines that hold packed weights on one machine at a time.

    Raises:
        ValueError: if oneDNN is requested and this torch does not have it.
    """
    if uses is not None:
        uses = frozenset(uses)
        if uses and not has_onednn():
            raise ValueError(
                "model.onednn requests oneDNN, which this build of torch does not have: use model.onednn=[]"
            )
        _Choice.uses = uses
    elif _Choice.uses is None:
        _Choice.uses = frozenset(probe_products(linear_shapes(config), engines=engines))
    return tuple(use for use in PRODUCT_USES if use in _Choice.uses)


def linear_shapes(config: PreTrainedConfig) -> tuple[Shape, ...]:
    """Return the linear layers of a model's decoder and its vocabulary projection."""
    text = config.get_text_config()
    width, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    head = text.to_dict().get("head_dim") or width // text.num_attention_heads
    queries, keys = head * text.num_attention_heads, head * text.num_key_value_heads
    return (
        Shape(queries, width, layers),
        Shape(keys, width, 2 * layers),
        Shape(width, queries, layers),
        Shape(inner, width, 2 * layers),
        Shape(width, inner, layers),
        Shape(text.vocab_size, width),
    )


def packed_bytes(shapes: Iterable[Shape]) -> int:
    """Return the size of these layers' packed weights in bytes."""
    return 4 * sum(shape.layers * shape.outputs * shape.inputs for shape in shapes)


def probe_products(shapes: Sequence[Shape], *, engines: int = 1) -> tuple[str, ...]:
    """Return the uses for which oneDNN beats torch by `MARGIN`, over all of a model's layers."""
    if not has_onednn():
        return ()
    sides: dict[str, tuple[_Side, _Side]] = {
        "many_rows": (_there_and_back(F.linear), _there_and_back(onednn)),
        "weight_gradients": (lambda x, _, grad: _torch_gradient(grad, x), lambda x, _, grad: _onednn_gradient(grad, x)),
    }
    with torch.inference_mode():
        chosen = _probe_decoding(_sample(shapes), may_pack=may_pack(shapes, engines=engines))
        for use, pair in sides.items():
            ours = theirs = 0.0
            for shape in shapes:
                outputs = max(1, min(shape.outputs, _NUMBERS // shape.inputs))
                x, weight = torch.ones(_ROWS, shape.inputs), torch.ones(outputs, shape.inputs)
                grad = torch.ones(_ROWS, outputs)
                seconds = _fastest(_SECONDS, *(functools.partial(side, x, weight, grad) for side in pair))
                scale = shape.layers * shape.outputs / outputs
                theirs, ours = theirs + scale * seconds[0], ours + scale * seconds[1]
            if ours < MARGIN * theirs:
                chosen.append(use)
    return tuple(use for use in PRODUCT_USES if use in chosen)


def _sample(shapes: Sequence[Shape]) -> list[Tensor]:
    """Create a model's separate weights [N, K]: all, or equal shares per shape in `STEP_BYTES`."""
    room = min(STEP_BYTES, max(STEP_BYTES / 16, STEP_SHARE * _memory_bytes()))
    share = min(1.0, room / packed_bytes(shapes))
    weights = []
    for shape in shapes:
        layers = max(1, int(share * shape.layers))
        outputs = max(1, min(shape.outputs, round(share * shape.layers * shape.outputs / layers)))
        weights += [torch.ones(outputs, shape.inputs) for _ in range(layers)]
    return weights


def _probe_decoding(weights: Sequence[Tensor], *, may_pack: bool) -> list[str]:
    """Return which of few_rows and packed_weights speed up a decode step, packing included."""
    rows = {weight.shape[1]: torch.ones(STEP_ROWS, weight.shape[1]) for weight in weights}

    def step(product: Product, weights: Sequence[Tensor]) -> None:
        for weight in weights:
            product(rows[weight.shape[1]], weight)

    calls = [lambda: step(F.linear, weights), lambda: step(onednn, weights)]
    packing = 0.0
    if may_pack:
        packed = [pack(weight) for weight in weights]  # the first time includes setup
        start = time.perf_counter()
        packed = [pack(weight) for weight in weights]
        packing = time.perf_counter() - start
        calls.append(lambda: step(onednn, packed))
    torch_s, onednn_s, *packed_s = _fastest(STEP_SECONDS, *calls)
    chosen = ["few_rows"] if onednn_s < MARGIN * torch_s else []
    unpacked_s = onednn_s if chosen else torch_s
    if packed_s and packed_s[0] + packing / PACKED_STEPS < MARGIN * unpacked_s:
        chosen.append("packed_weights")
    return chosen


def may_pack(shapes: Iterable[Shape], *, engines: int) -> bool:
    """Return whether packed weights of all engines take at most `PACKED_SHARE` of the memory."""
    return engines * packed_bytes(shapes) <= PACKED_SHARE * _memory_bytes()


def _memory_bytes() -> int:
    """Return this machine's memory, or its container's or `ulimit`'s limit; 0 if unknown."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in os.sysconf_names else 0
    return min([machine, *(limit for limit in (memory_limit(), address_limit()) if limit is not None)])


def _there_and_back(product: Product) -> _Side:
    """Return a layer's product plus input gradient, chosen alike for the weight's other side."""

    def run(x: Tensor, weight: Tensor, grad: Tensor) -> None:
        product(x, weight)
        product(grad, weight.T)

    return run


def _torch_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.T @ x


def _onednn_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return onednn(grad.T, x.T)


def _fastest(seconds: float, *calls: Callable[[], object]) -> tuple[float, ...]:
    """Return each call's least seconds, the least disturbed by other load; the calls take turns.

    Each call gets about `seconds` in total, but at least two turns: the first includes setup.
    """
    best, spent = [float("inf")] * len(calls), 0.0
    for turn in range(50):
        for side, call in enumerate(calls):
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            best[side] = min(best[side], taken)
            spent += taken
        if turn >= 1 and spent > len(calls) * seconds:
            break
    return tuple(best)


@functools.cache
def bfloat16_speed() -> float:
    """Return bfloat16's speed relative to float32 here; below 0.01 on CPUs without AVX-512."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 256, generator=generator) for rows in (64, 256))
    half = x.bfloat16(), weight.bfloat16()
    with torch.inference_mode():
        best = [float("inf"), float("inf")]
        for _ in range(5):
            for side, operands in enumerate(((x, weight), half)):
                start = time.perf_counter()
                F.linear(*operands)
                best[side] = min(best[side], time.perf_counter() - start)
    return best[0] / best[1]
