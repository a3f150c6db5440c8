"""Which library multiplies float32 matrices on this CPU: torch's own product (MKL as a rule) or oneDNN, a part of torch.

Neither is faster everywhere: on some processors oneDNN takes half the time, on others as long. So a short probe with the
model's own shapes decides, for each use apart. The numbers agree to rounding, not bit by bit: all processes of a run follow
one choice, which a run keeps in versions.json and takes up again when it is resumed.
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

from rlmed.core.config_checks import PRODUCT_USES
from rlmed.core.threads import memory_limit

MIN_ROWS = 128
"""Products of fewer rows, as when tokens are decoded, are a use of their own."""
MARGIN = 0.9
"""oneDNN is taken where it needs at most this share of torch's time: noise alone shall not decide."""
SECONDS = 0.008
"""Time for one shape on one side, at most; three runs at least."""
LARGEST = {"few_rows": 2**21, "many_rows": 2**19, "weight_gradients": 2**19}
"""Numbers of a weight in the probe; of longer ones only the first outputs are computed."""
PACKED_FOR_ROWS = 64
"""Rows that weights are packed for, always the same number: the order, and so the bits of a result, may depend on it."""
PACKED_STEPS = 64
"""Decode steps within which packing has to pay."""
PACKED_SHARE = 0.25
"""Of the machine's memory, what packed weights may take at most."""
_PACKED_ROWS = 16
"""Rows of the probe of packed weights: packing helps where few completions are left, and at 64 rows it hardly does."""
_ROWS = {"few_rows": 32, "many_rows": 256, "weight_gradients": 256}

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear layer's sizes, and how many layers have them."""

    outputs: int
    inputs: int
    layers: int = 1


def has_onednn() -> bool:
    """Whether torch was built with oneDNN's linear product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for float32 x [M, K], weight [N, K] and bias [N], by oneDNN; strides are free."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack(weight: Tensor) -> Tensor:
    """A copy of a float32 weight [N, K] in oneDNN's order, for `onednn` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)


class _Choice:
    """The uses for which this process calls oneDNN; None until it was settled."""

    uses: frozenset[str] | None = None


def uses_onednn(use: str) -> bool:
    """Whether products of this use (one of `PRODUCT_USES`) go through oneDNN in this process."""
    return use in (_Choice.uses or ())


def settle_products(config: PreTrainedConfig, uses: Iterable[str] | None = None) -> tuple[str, ...]:
    """Decide for this process, once: by `uses` where given, else by the first probe; return the uses of oneDNN in order.

    Raises:
        ValueError: when oneDNN is asked for and this torch has none.
    """
    if uses is not None:
        uses = frozenset(uses)
        if uses and not has_onednn():
            raise ValueError(
                "model.onednn asks for oneDNN, which this build of torch does not have: use model.onednn=[]"
            )
        _Choice.uses = uses
    elif _Choice.uses is None:
        _Choice.uses = frozenset(probe_products(linear_shapes(config)))
    return tuple(use for use in PRODUCT_USES if use in _Choice.uses)


def linear_shapes(config: PreTrainedConfig) -> tuple[Shape, ...]:
    """The linear layers of a model's decoder and its vocabulary projection."""
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


def probe_products(shapes: Sequence[Shape]) -> tuple[str, ...]:
    """The uses for which oneDNN is faster than torch here, by `MARGIN`, over all layers of a model together."""
    if not has_onednn():
        return ()
    sides: dict[str, tuple[Product, Product]] = {
        "few_rows": (F.linear, onednn),
        "many_rows": (F.linear, onednn),
        "weight_gradients": (_torch_gradient, _onednn_gradient),
    }
    chosen = []
    with torch.inference_mode():
        for use, pair in sides.items():
            ours = theirs = 0.0
            for shape in shapes:
                outputs = max(1, min(shape.outputs, LARGEST[use] // shape.inputs))
                seconds = _race(use, outputs, shape.inputs, *pair)
                scale = shape.layers * shape.outputs / outputs
                theirs, ours = theirs + scale * seconds[0], ours + scale * seconds[1]
            if ours < MARGIN * theirs:
                chosen.append(use)
        if _packing_pays(shapes, onednn if "few_rows" in chosen else F.linear):
            chosen.append("packed_weights")
    return tuple(chosen)


def _packing_pays(shapes: Sequence[Shape], unpacked: Product) -> bool:
    """Whether decoding on packed weights is faster than by `unpacked`, the packing itself included."""
    size = 4 * sum(shape.layers * shape.outputs * shape.inputs for shape in shapes)
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or size > PACKED_SHARE * _memory_bytes():
        return False
    ours = theirs = 0.0
    for shape in shapes:
        outputs = max(1, min(shape.outputs, LARGEST["few_rows"] // shape.inputs))
        x, weight = torch.ones(_PACKED_ROWS, shape.inputs), torch.ones(outputs, shape.inputs)
        packed = pack(weight)
        (packing,) = _fastest(lambda weight=weight: pack(weight))
        seconds = _fastest(lambda x=x, weight=weight: unpacked(x, weight), lambda x=x, packed=packed: onednn(x, packed))
        scale = shape.layers * shape.outputs / outputs
        theirs, ours = theirs + scale * seconds[0], ours + scale * (seconds[1] + packing / PACKED_STEPS)
    return ours < MARGIN * theirs


def _memory_bytes() -> int:
    """Of this machine, or of the container; 0 where the system does not say."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in os.sysconf_names else 0
    limit = memory_limit()
    return machine if limit is None else min(machine, limit)


def _torch_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.T @ x


def _onednn_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return onednn(grad.T, x.T)


def _race(use: str, outputs: int, inputs: int, first: Product, second: Product) -> tuple[float, ...]:
    """Least seconds of each product, see `_fastest`."""
    rows = _ROWS[use]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    size = (rows, outputs) if use == "weight_gradients" else (outputs, inputs)
    other = torch.randn(size, generator=generator)
    operands = (other, x) if use == "weight_gradients" else (x, other)
    return _fastest(lambda: first(*operands), lambda: second(*operands))


def _fastest(*calls: Callable[[], object]) -> tuple[float, ...]:
    """Least seconds of each call; they take turns, and the least is what other work on the machine disturbs least."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()  # what a first call sets up does not count
    spent = 0.0
    for turn in range(50):
        for side, call in enumerate(calls):
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            best[side] = min(best[side], taken)
            spent += taken
        if turn >= 2 and spent > len(calls) * SECONDS:
            break
    return tuple(best)


@functools.cache
def bfloat16_speed() -> float:
    """Speed of a bfloat16 product as a multiple of the float32 one's here; below 0.01 on processors without AVX-512."""
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
