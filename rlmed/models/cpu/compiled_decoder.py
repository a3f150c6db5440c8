"""Prompts and decode steps in compiled C++ (`decode.cpp`): float32 on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_float, c_int, c_int32, c_int64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlmed.models.cpu.compiler import load_library
from rlmed.models.cpu.linear import current_packs, notices_changes
from rlmed.models.decoder import Decoder

if TYPE_CHECKING:
    from rlmed.models.decode_kernels import StepPages

_floats, _ints = POINTER(c_float), POINTER(c_int32)


class _Product(Structure):
    _fields_ = [
        ("weight", _floats),
        ("bias", _floats),
        ("panels", c_int64),
        ("inputs", c_int64),
        ("outputs", c_int64),
    ]


class _Norm(Structure):
    _fields_ = [("weight", _floats), ("epsilon", c_float)]


class _Layer(Structure):
    _fields_ = [
        ("input_norm", _Norm),
        ("mlp_norm", _Norm),
        ("heads", _Product),
        ("output", _Product),
        ("gate_up", _Product),
        ("down", _Product),
        *((f"{part}_{what}", _floats) for part in ("prefix", "suffix") for what in ("keys", "values")),
    ]


class _Step(Structure):
    _fields_ = [
        *(
            (name, c_int64)
            for name in ("rows", "groups", "members", "width", "heads", "kv_heads", "head_width", "layers")
        ),
        ("scale", c_float),
        ("norm", _Norm),
        ("layer", POINTER(_Layer)),
        *((name, _ints) for name in ("prefix_pages", "prefix_lengths", "member_rows", "suffix_pages", "counts")),
        *((name, c_int64) for name in ("prefix_columns", "suffix_columns", "prefix_tokens", "suffix_tokens")),
        *((name, _floats) for name in ("cosine", "sine", "states", "normal", "projected", "attended", "gated")),
    ]


def _address(tensor: Tensor, kind: Any = _floats) -> Any:
    return ctypes.cast(tensor.data_ptr(), kind)


class _Packed:
    """A weight [N, K] in panels, and its bias."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None, outputs: int | None = None) -> None:
        """Pack; `outputs` counts the results if two numbers make one."""
        panel = 2 * library.rlmed_lanes()
        panels, inputs = -(-len(weight) // panel), weight.shape[1]
        self._weight = weight.new_empty(panels * panel * inputs)
        source = weight.contiguous()
        library.rlmed_pack(
            _address(source),
            c_int64(len(source)),
            c_int64(inputs),
            _address(self._weight),
            c_int(torch.get_num_threads()),
        )
        self._bias = None if bias is None else F.pad(bias, (0, panels * panel - len(bias)))
        self.structure = _Product(
            weight=_address(self._weight),
            bias=None if self._bias is None else _address(self._bias),
            panels=panels,
            inputs=inputs,
            outputs=len(weight) if outputs is None else outputs,
        )


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Return the layers' weights and biases one after the other."""
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    weights: list[Tensor] = [linear.weight for linear in linears]
    return torch.cat(weights), torch.cat(biases) if biases else None


def _interleaved(first: Tensor, second: Tensor, lanes: int) -> Tensor:
    """Return `lanes` rows of one, `lanes` of the other, and so on; zeros after the last rows."""
    rows = -(-len(first) // lanes) * lanes
    padded = [F.pad(one, (0, 0) * (one.ndim - 1) + (0, rows - len(one))) for one in (first, second)]
    return torch.stack([one.unflatten(0, (-1, lanes)) for one in padded], dim=1).flatten(0, 2)


class _Weights:
    """All layers' packed weights, and where their norms' weights are."""

    def __init__(self, library: ctypes.CDLL, own: Decoder) -> None:
        self._keep: list[_Packed] = []
        self.layers = (_Layer * len(own.layers))()
        for entry, layer in zip(self.layers, own.layers, strict=True):
            entry.input_norm = _norm(layer.input_norm)
            entry.mlp_norm = _norm(layer.mlp_norm)
            lanes = library.rlmed_lanes()
            biases = (layer.gate.bias, layer.up.bias)
            packed = [
                _Packed(library, *_joined(layer.projections)),
                _Packed(library, layer.output.weight, layer.output.bias),
                _Packed(
                    library,
                    _interleaved(layer.gate.weight, layer.up.weight, lanes),
                    None if biases[0] is None else _interleaved(*biases, lanes),
                    outputs=layer.gate.out_features,
                ),
                _Packed(library, layer.down.weight, layer.down.bias),
            ]
            entry.heads, entry.output, entry.gate_up, entry.down = (one.structure for one in packed)
            self._keep += packed
        self.norm = _norm(own.norm)
        self.pages: StepPages | None = None
        """Where the layers find keys and values."""

    def use(self, pages: StepPages, own: Decoder) -> None:
        """Let the layers find keys and values there."""
        for layer, entry in zip(own.layers, self.layers, strict=True):
            entry.prefix_keys, entry.prefix_values = (_address(store[layer.index]) for store in pages.prefix)
            entry.suffix_keys, entry.suffix_values = (_address(store[layer.index]) for store in pages.suffix)
        self.pages = pages


def _check(parameters: Iterable[Tensor]) -> None:
    """Raise ValueError if some cannot be read, or a change of them would go unnoticed."""
    for one in parameters:
        if one.dtype != torch.float32 or one.device.type != "cpu" or not one.is_contiguous():
            raise ValueError("its weights are not all contiguous float32 on the CPU")
        if not notices_changes(one):
            raise ValueError("a change of its weights would go unnoticed")


def _norm(norm: Any) -> _Norm:
    return _Norm(weight=_address(norm.module.weight), epsilon=norm.epsilon)


class CompiledDecoder:
    """Computes what an accepted `Decoder` does, for decode steps; reads the same parameters."""

    def __init__(self, own: Decoder) -> None:
        """Share the decoder's parameters.

        Raises:
            CompilerError: without a library.
            ValueError: if a parameter cannot be read, or its change would go unnoticed.
        """
        self.own, self._library = own, load_library()
        linears = [
            linear
            for layer in own.layers
            for linear in (*layer.projections, layer.output, layer.gate, layer.up, layer.down)
        ]
        norms = [own.norm, *(norm for layer in own.layers for norm in (layer.input_norm, layer.mlp_norm))]
        # not the parameters: others may take their place
        self._holders = [module._parameters for module in (*linears, *(norm.module for norm in norms))]
        _check(self._parameters())
        self.angles = _AngleTable(own)

    def lay_out(self, pages: StepPages) -> _Steps:
        """See `StepDecoder`."""
        return _Steps(self, pages)

    def lay_out_prompts(self, pages: StepPages) -> PromptLayout:
        """Return a layout of prompts one after the other.

        `pages` are those of their groups; `members` [B, 1] are the prompts' first rows, and
        `counts` has an entry for each of their tokens.
        """
        return PromptLayout(self, pages)

    def weights(self) -> _Weights:
        """Return the packed weights as they are now."""
        parameters = self._parameters()

        def make() -> _Weights:
            _check(parameters)
            return _Weights(self._library, self.own)

        return current_packs().made(parameters, make)

    def _parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(one for holder in self._holders for one in holder.values() if one is not None)

    def run(self, step: _Step, *, prompts: bool) -> None:
        """Run all layers."""
        self._library.rlmed_decode(byref(step), c_bool(prompts), c_int(torch.get_num_threads()))


class _AngleTable:
    """Cosines and sines of rotary embeddings by position.

    Completions have the same position in all rows of M-RoPE, and looking an angle up takes a tenth
    of computing it.
    """

    def __init__(self, own: Decoder) -> None:
        self._own = own
        self._table = (torch.empty(0, 0), torch.empty(0, 0))

    def of(self, embeddings: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return contiguous cosine and sine [R, D] of positions, int64 [3, R] or [1, R]."""
        if not self._own.fixed_angles or (len(positions) > 1 and positions.stride(0) != 0):
            return self._computed(embeddings, positions)
        most, table = int(positions[0].max()), self._table
        if most >= len(table[0]):
            every = torch.arange(2 * (most + 1)).expand(len(positions), -1)
            table = self._computed(embeddings.new_empty(every.shape[1], embeddings.shape[1]), every)
            self._table = table  # of engines in other threads, too
        return table[0].index_select(0, positions[0]), table[1].index_select(0, positions[0])

    def _computed(self, embeddings: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = self._own.angles(embeddings, positions.unsqueeze(1) if len(positions) > 1 else positions)
        return cosine.contiguous(), sine.contiguous()


class _Layers:
    """All layers for rows in pages that stay."""

    def __init__(self, decoder: CompiledDecoder, pages: StepPages) -> None:
        self._decoder, self._pages = decoder, pages
        own, rows = decoder.own, len(pages.counts)
        first = own.layers[0]
        width, heads = len(own.norm.module.weight), first.heads * first.head_width
        gated = max(layer.gate.out_features for layer in own.layers)
        sizes = (width, heads + 2 * first.kv_heads * first.head_width, heads, gated)
        self._buffers = [torch.zeros(rows, size, dtype=torch.float32) for size in sizes]
        names = ("normal", "projected", "attended", "gated")
        self._step = _Step(
            rows=rows,
            groups=len(pages.prefix_lengths),
            members=pages.members.shape[1],
            width=width,
            heads=first.heads,
            kv_heads=first.kv_heads,
            head_width=first.head_width,
            layers=len(own.layers),
            scale=first.scale,
            prefix_pages=_address(pages.prefix_pages, _ints),
            prefix_lengths=_address(pages.prefix_lengths, _ints),
            member_rows=_address(pages.members, _ints),
            suffix_pages=_address(pages.suffix_pages, _ints),
            counts=_address(pages.counts, _ints),
            prefix_columns=pages.prefix_pages.shape[1],
            suffix_columns=pages.suffix_pages.shape[1],
            prefix_tokens=pages.prefix[1][0].shape[2],
            suffix_tokens=pages.suffix[1][0].shape[2],
            **dict(zip(names, map(_address, self._buffers), strict=True)),
        )

    def _run(self, embeddings: Tensor, cosine: Tensor, sine: Tensor, *, prompts: bool) -> Tensor:
        weights, step = self._decoder.weights(), self._step
        if weights.pages is not self._pages:
            weights.use(self._pages, self._decoder.own)
        step.layer, step.norm = weights.layers, weights.norm
        step.cosine, step.sine, step.states = map(_address, (cosine, sine, embeddings))
        self._decoder.run(step, prompts=prompts)
        return self._buffers[0]


class _Steps(_Layers):
    """Decode steps; see `StepDecoder`."""

    def __call__(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Take a step; the result is overwritten by the next one."""
        return self._run(embeddings, *self._decoder.angles.of(embeddings, positions), prompts=False)


class PromptLayout(_Layers):
    """Prompts one after the other: computes all layers itself, see `LayersLayout`."""

    def layers(self, embeddings: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """See `rlmed.models.decoder.LayersLayout`."""
        # the embeddings may be a parameter's rows that others read
        own = embeddings.clone(memory_format=torch.contiguous_format)
        return self._run(own, cosine.contiguous(), sine.contiguous(), prompts=True)


@dataclass(frozen=True, slots=True)
class CompiledProjection:
    """Logits of hidden states by the packed vocabulary projection."""

    projection: nn.Linear
    """Its weight: [V, d]."""
    banned: Tensor
    """int64, unsampleable tokens."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return [R, V] for [R, d]; -inf at unsampleable tokens."""
        library, weight = load_library(), self.projection.weight

        def make() -> _Packed:
            _check((weight,))
            return _Packed(library, weight, self._bias(weight))

        packed = current_packs().made((weight,), make)
        logits = hidden.new_empty(len(hidden), len(weight))
        library.rlmed_multiply(
            byref(packed.structure),
            _address(hidden),
            c_int64(len(hidden)),
            _address(logits),
            c_int(torch.get_num_threads()),
        )
        return logits

    def _bias(self, weight: Tensor) -> Tensor | None:
        if not len(self.banned):
            return None
        return weight.new_zeros(len(weight)).index_fill_(0, self.banned, float("-inf"))


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row, see `rollout.native.sampler.BatchSampling.sample`.

    Args:
        logits: float32 [R, V].
        uniform: float64 [R].
        temperature: float32 [R].
        greedy: bool [R].

    Returns:
        int64 [R] tokens and float32 [R] log-probabilities.
    """
    logits, uniform, temperature, greedy = (one.contiguous() for one in (logits, uniform, temperature, greedy))
    rows, count = logits.shape
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    load_library().rlmed_sample(
        _address(logits),
        c_int64(rows),
        c_int64(count),
        _address(uniform, POINTER(c_double)),
        _address(temperature),
        _address(greedy, POINTER(c_bool)),
        _address(tokens, POINTER(c_int64)),
        _address(logprobs),
        c_int(torch.get_num_threads()),
    )
    return tokens, logprobs
