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
from rlmed.core.display import address_limit
from rlmed.core.threads import memory_limit

MIN_ROWS = 128
"""Products of fewer rows, as when tokens are decoded, are a use of their own."""
MARGIN = 0.9
"""oneDNN is taken where it needs at most this share of torch's time: noise alone shall not decide."""
PACKED_FOR_ROWS = 64
"""Rows that weights are packed for, always the same number: the order, and so the bits of a result, may depend on it."""
PACKED_STEPS = 64
"""Decode steps within which packing has to pay."""
PACKED_SHARE = 0.25
"""Of the machine's memory, what the packed weights of all engines may take at most."""
STEP_BYTES = 256 * 2**20
"""Of weights that the probe of decoding walks over: more than caches hold, so that they come from memory as a model's do."""
STEP_SHARE = 1 / 32
"""Of the machine's memory, what these weights may take at most; their packed copies take as much again."""
STEP_ROWS, STEP_SECONDS = 16, 0.1
"""Completions in that probe (with many left, packing hardly matters), and its time for each side; two steps at least."""
_ROWS, _NUMBERS, _SECONDS = 256, 2**19, 0.008
"""Of the other probes: rows, numbers of a weight (of longer ones the first outputs), time for each shape and side. A weight
serves so many rows at a time that it does not matter where it comes from."""

Product = Callable[[Tensor, Tensor], Tensor]
_Side = Callable[[Tensor, Tensor, Tensor], object]
"""What is done with rows [M, K], a weight [N, K] and the gradient [M, N] of their product."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear layer's sizes, and how many layers have them."""

    outputs: int
    inputs: int
    layers: int = 1


@functools.cache
def has_onednn() -> bool:
    """Whether oneDNN's linear product, of packed weights too, is in this torch and computes what it should here."""
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    x, weight = torch.ones(2, 16), torch.ones(32, 16)  # sums of ones are exact
    try:
        return all(torch.equal(onednn(x, one), x @ weight.T) for one in (weight, pack(weight)))
    except RuntimeError:
        return False


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


def settle_products(
    config: PreTrainedConfig, uses: Iterable[str] | None = None, *, engines: int = 1
) -> tuple[str, ...]:
    """Decide for this process, once: by `uses` where given, else by the first probe; return the uses of oneDNN in order.

    `engines` is how many hold packed weights on one machine at a time.

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
        _Choice.uses = frozenset(probe_products(linear_shapes(config), engines=engines))
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


def packed_bytes(shapes: Iterable[Shape]) -> int:
    """What the packed copies of these layers' weights take."""
    return 4 * sum(shape.layers * shape.outputs * shape.inputs for shape in shapes)


def probe_products(shapes: Sequence[Shape], *, engines: int = 1) -> tuple[str, ...]:
    """The uses for which oneDNN is faster than torch here, by `MARGIN`, over all layers of a model together."""
    if not has_onednn():
        return ()
    sides: dict[str, tuple[_Side, _Side]] = {
        "many_rows": (_there_and_back(F.linear), _there_and_back(onednn)),
        "weight_gradients": (lambda x, _, grad: _torch_gradient(grad, x), lambda x, _, grad: _onednn_gradient(grad, x)),
    }
    with torch.inference_mode():
        may_pack = engines * packed_bytes(shapes) <= PACKED_SHARE * _memory_bytes()
        chosen = _probe_decoding(_sample(shapes), may_pack=may_pack)
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
    """Weights of a model [N, K], apart in memory: all of it, or so much of each shape that `STEP_BYTES` hold them."""
    room = min(STEP_BYTES, max(STEP_BYTES / 16, STEP_SHARE * _memory_bytes()))
    share = min(1.0, room / packed_bytes(shapes))
    weights = []
    for shape in shapes:
        layers = max(1, int(share * shape.layers))
        outputs = max(1, min(shape.outputs, round(share * shape.layers * shape.outputs / layers)))
        weights += [torch.ones(outputs, shape.inputs) for _ in range(layers)]
    return weights


def _probe_decoding(weights: Sequence[Tensor], *, may_pack: bool) -> list[str]:
    """Which of few_rows and packed_weights make a decode step over all these weights faster, the packing included."""
    rows = {weight.shape[1]: torch.ones(STEP_ROWS, weight.shape[1]) for weight in weights}

    def step(product: Product, weights: Sequence[Tensor]) -> None:
        for weight in weights:
            product(rows[weight.shape[1]], weight)

    calls = [lambda: step(F.linear, weights), lambda: step(onednn, weights)]
    packing = 0.0
    if may_pack:
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


def _memory_bytes() -> int:
    """Of this machine, or what container or `ulimit` leave of it; 0 where the system does not say."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in os.sysconf_names else 0
    return min([machine, *(limit for limit in (memory_limit(), address_limit()) if limit is not None)])


def _there_and_back(product: Product) -> _Side:
    """A layer's product and the gradient of its input, which follows the same choice along the weight's other side."""

    def run(x: Tensor, weight: Tensor, grad: Tensor) -> None:
        product(x, weight)
        product(grad, weight.T)

    return run


def _torch_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.T @ x


def _onednn_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return onednn(grad.T, x.T)


def _fastest(seconds: float, *calls: Callable[[], object]) -> tuple[float, ...]:
    """Least seconds of each call; they take turns, and the least is what other work on the machine disturbs least.

    Each has about so many `seconds` in all, but two turns at least: a first call sets things up.
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
