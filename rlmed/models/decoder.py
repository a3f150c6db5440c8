"""A decoder's forward pass for sampling, with fewer operators than its modules.

A decode step computes one token per completion: so little that dispatching operators and calling
modules takes as long as the numbers. `Decoder` reads the same parameters and computes the same
function, without gradients: norm; queries, keys and values; rotary embedding; attention by the
layout; output product plus residual; norm; gated products; down product plus residual. It makes no
decision that depends on a tensor's numbers, so a CUDA graph can capture it.

No list of model names decides where it is used. `accept_decoder` runs one layer of every kind in
the model through transformers' modules and through `Decoder`, and takes it only if the results
agree to rounding.
"""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlmed.models.attention import AttentionLayout, PackedLayout
from rlmed.models.cpu.linear import matmul_joined, matmul_plus, matmul_silu, matmul_times, matmul_transposed

log = logging.getLogger(__name__)

READ = ("inputs_embeds", "position_ids", "layout")
"""Arguments of transformers' decoders that `Decoder` reads."""
PROBE_TOKENS = 5
PROBE_TOLERANCE = 1e-4
"""Largest difference in the probe, relative to the largest number.

Sums of n float32 products in other orders differ by about sqrt(n) * 6e-8 of their terms, 1e-5 for
the widest layers; another norm, activation or scale by 1e-2 and more.
"""


@runtime_checkable
class LayersLayout(Protocol):
    """A layout that computes all layers itself."""

    def layers(self, embeddings: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return final hidden states [N, d] of embeddings [N, d], for angles [N, D]."""
        ...


@dataclass(frozen=True, slots=True)
class _Norm:
    """Root-mean-square norm."""

    module: Any
    epsilon: float

    @classmethod
    def of(cls, module: Any) -> _Norm:
        return cls(module, module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.module.weight, self.epsilon)


def _norms(layer: Any) -> tuple[Any, Any]:
    """Return the norms before attention and before the gated products of a layer."""
    return layer.input_layernorm, layer.post_attention_layernorm


@dataclass(frozen=True, slots=True)
class _Rotation:
    """Rotary embedding: x cos + rotate_half(x) sin; rotate_half: [a, b] to [-b, a]."""

    cos: Tensor
    """[N, heads or 1, D]."""
    sin: tuple[Tensor, Tensor]
    """[N, heads or 1, D / 2] of both halves."""

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor) -> _Rotation:
        """Split the sine."""
        low, high = sin.chunk(2, dim=-1)
        return cls(cos, (low, high))

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate [N, heads, D]."""
        turned = x * self.cos
        low, high = x.chunk(2, dim=-1)
        turned_low, turned_high = turned.chunk(2, dim=-1)
        turned_low.addcmul_(high, self.sin[0], value=-1)
        turned_high.addcmul_(low, self.sin[1])
        return turned


@dataclass(frozen=True, slots=True)
class _Rotations:
    """Rotations of one pass."""

    query: _Rotation
    key: _Rotation
    both: _Rotation
    """Of queries and keys side by side."""
    scale_in_query: bool
    """The queries' rotation includes the scale of the scores."""

    @classmethod
    def build(cls, cos: Tensor, sin: Tensor, layer: _Layer) -> _Rotations:
        """Prepare the rotations by cos and sin [N, D]."""
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        # in half precision the scale would round the factors; it is then applied to float32 scores
        scaled = cos.dtype == torch.float32
        scale = layer.scale if scaled else 1.0
        query_cos, query_sin = (cos * scale, sin * scale) if scaled else (cos, sin)
        wide = [
            torch.cat([own.expand(-1, layer.heads, -1), others.expand(-1, layer.kv_heads, -1)], dim=1)
            for own, others in ((query_cos, cos), (query_sin, sin))
        ]
        return cls(_Rotation.of(query_cos, query_sin), _Rotation.of(cos, sin), _Rotation.of(*wide), scaled)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A decoder layer's parameters and sizes."""

    index: int
    input_norm: _Norm
    projections: tuple[nn.Linear, nn.Linear, nn.Linear]
    """Of queries, keys and values."""
    output: nn.Linear
    mlp_norm: _Norm
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    heads: int
    kv_heads: int
    head_width: int
    scale: float

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        """Read a layer of transformers.

        Raises:
            AttributeError: if it is built otherwise.
            ValueError: if it has other parts than a `_Layer`.
        """
        attention, mlp = layer.self_attn, layer.mlp
        width = attention.head_dim
        norms = [_Norm.of(norm) for norm in _norms(layer)]
        found = cls(
            index=attention.layer_idx,
            input_norm=norms[0],
            projections=(attention.q_proj, attention.k_proj, attention.v_proj),
            output=attention.o_proj,
            mlp_norm=norms[1],
            gate=mlp.gate_proj,
            up=mlp.up_proj,
            down=mlp.down_proj,
            heads=attention.q_proj.out_features // width,
            kv_heads=attention.k_proj.out_features // width,
            head_width=width,
            scale=attention.scaling,
        )
        linears = (*found.projections, found.output, found.gate, found.up, found.down)
        if any(type(linear) is not nn.Linear for linear in linears):
            raise ValueError("a product is not a plain linear layer")
        used = {id(p) for part in (*linears, *_norms(layer)) for p in part.parameters()}
        if other := [name for name, parameter in layer.named_parameters() if id(parameter) not in used]:
            raise ValueError(f"it has another part, {other[0].rpartition('.')[0]}")
        if vars(attention).get("sliding_window"):
            raise ValueError("it attends within a window")
        if len({linear.bias is None for linear in found.projections}) > 1:
            raise ValueError("some of its queries, keys and values have a bias and others none")
        return found

    def __call__(self, x: Tensor, rotations: _Rotations, layout: AttentionLayout) -> Tensor:
        """Return the layer's output for x [N, d], which may be overwritten."""
        query, key, value = self._heads(self.input_norm(x), rotations)
        scale = 1.0 if rotations.scale_in_query else self.scale
        attended = layout.attend(self.index, query, key, value, scale).reshape(len(x), -1)
        x = matmul_plus(attended, self.output.weight, self.output.bias, x)
        normal = self.mlp_norm(x)
        gated = matmul_silu(normal, self.gate.weight, self.gate.bias)
        gated = matmul_times(normal, self.up.weight, self.up.bias, gated)
        return matmul_plus(gated, self.down.weight, self.down.bias, x)

    def _heads(self, x: Tensor, rotations: _Rotations) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries [N, H, D] and keys [N, H_kv, D], and values [N, H_kv, D]."""
        shape, turned = (len(x), -1, self.head_width), self.heads + self.kv_heads
        biases = tuple(linear.bias for linear in self.projections if linear.bias is not None)
        joined = matmul_joined(x, tuple(linear.weight for linear in self.projections), biases)
        if joined is not None:
            together, value = joined.view(shape).split([turned, self.kv_heads], dim=1)
            query, key = rotations.both(together).split([self.heads, self.kv_heads], dim=1)
            return query, key, value
        query, key, value = (
            matmul_transposed(x, linear.weight, linear.bias).view(shape) for linear in self.projections
        )
        return rotations.query(query), rotations.key(key), value


class Decoder:
    """A decoder of transformers, computed without gradients.

    Example:
        >>> decoder = accept_decoder(policy.model)                                  # doctest: +SKIP
        >>> hidden = decoder(embeddings, position_ids, layout)                      # doctest: +SKIP
    """

    def __init__(self, decoder: Any) -> None:
        """Share the parameters of transformers' decoder (its text model).

        Raises:
            AttributeError: if it is built otherwise.
            ValueError: if it has other parts.
        """
        self._embed: nn.Module = decoder.embed_tokens
        self._rotary: nn.Module = decoder.rotary_emb
        self.layers = [_Layer.of(layer) for layer in decoder.layers]
        self.norm = _Norm.of(decoder.norm)
        sizes = {(layer.heads, layer.kv_heads, layer.head_width, layer.scale) for layer in self.layers}
        if len(sizes) != 1:
            raise ValueError("its layers differ in their heads")

    @property
    def fixed_angles(self) -> bool:
        """Whether a position's rotary embedding is the same whatever the other positions."""
        return self._rotary.rope_type not in ("dynamic", "longrope")

    def embeddings(self, token_ids: Tensor) -> Tensor:
        """Return [N, d] for int64 [N]."""
        embedded: Tensor = self._embed(token_ids)
        return embedded

    def __call__(self, embeddings: Tensor, position_ids: Tensor, layout: AttentionLayout | LayersLayout) -> Tensor:
        """Return final hidden states [N, d].

        Args:
            embeddings: [N, d]; may be overwritten.
            position_ids: as transformers' decoder takes them: int64 [3, 1, N] or [1, N].
            layout: who attends to whom.
        """
        angles = self.angles(embeddings, position_ids)
        if isinstance(layout, LayersLayout):
            return layout.layers(embeddings, *angles)
        rotations = _Rotations.build(*angles, self.layers[0])
        x = embeddings
        for layer in self.layers:
            x = layer(x, rotations, layout)
        return self.norm(x)

    def angles(self, embeddings: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the rotary embedding, each [N, D].

        Raises:
            ValueError: if the model's has another shape.
        """
        cos, sin = self._rotary(embeddings, position_ids)
        if cos.shape != (1, len(embeddings), self.layers[0].head_width):
            raise ValueError("its rotary embedding has another shape")
        return cos[0], sin[0]


def accept_decoder(model: PreTrainedModel, *, position_rows: int) -> Decoder | None:
    """Return a `Decoder` if it computes what the model's modules do, else None and log why.

    Where a model computes embeddings with images first, its own decoder then uses it in inference
    mode.

    Args:
        model: loaded with shared-prefix attention.
        position_rows: 3 for M-RoPE, else 1.
    """
    decoder = model.get_decoder()
    if decoder.norm.weight.is_meta:
        return None  # it has no numbers to compare
    try:
        own = Decoder(decoder)
        difference = _probe(decoder, position_rows)
    except (AttributeError, ValueError) as error:
        reason = str(error)
    else:
        if difference <= PROBE_TOLERANCE:
            decoder.forward = types.MethodType(_forward(own), decoder)
            return own
        reason = f"a probe differs by {difference:.1g}"
    log.info("decode steps of %s run transformers' own modules: %s", model.config.model_type, reason)
    return None


def probe_copy(decoder: Any, layers: Iterable[nn.Module], norm: nn.Module) -> Any:
    """Return a decoder of transformers like this one, but with these layers and last norm."""
    probed = copy.copy(decoder)
    probed._modules = dict(decoder._modules)  # so that the model keeps its layers
    probed._modules |= {"layers": nn.ModuleList(layers), "norm": norm}
    return probed


@torch.inference_mode()
def _probe(decoder: Any, position_rows: int) -> float:
    """Return the largest difference of the two decoders, relative to the largest number.

    Both run with one layer of each kind and random weights, in float32 whatever the model's dtype:
    so rounding is small, and nothing hides behind weights near zero (where all activations are
    alike).
    """
    kinds = {repr(layer): layer for layer in reversed(decoder.layers)}
    probed = probe_copy(decoder, [_random_copy(layer) for layer in kinds.values()], _random_copy(decoder.norm))
    device = decoder.norm.weight.device
    # on the CPU, so that all devices have the same numbers
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(PROBE_TOKENS, len(decoder.norm.weight), generator=generator).to(device)
    positions = torch.randint(0, 50, (position_rows, 1, PROBE_TOKENS), generator=generator).to(device)
    positions = positions if position_rows > 1 else positions[0]
    layout = PackedLayout.build([(PROBE_TOKENS, ())], device)
    output = type(decoder).forward(
        probed, inputs_embeds=embeddings.unsqueeze(0), position_ids=positions, use_cache=False, layout=layout
    )
    expected: Tensor = output.last_hidden_state[0]
    actual = Decoder(probed)(embeddings.clone(), positions, layout)
    return float((actual - expected).abs().max() / expected.abs().max())


def _forward(own: Decoder) -> Callable[..., Any]:
    """Return a `forward` of transformers' decoder that uses `own` in inference mode."""

    def forward(decoder: Any, *arguments: Any, **named: Any) -> Any:
        embeddings, layout = named.get("inputs_embeds"), named.get("layout")
        # some models add more features of the images between their layers
        more = any(isinstance(value, (Tensor, list)) for name, value in named.items() if name not in READ)
        if not torch.is_inference_mode_enabled() or embeddings is None or layout is None or more:
            return type(decoder).forward(decoder, *arguments, **named)
        # Any: transformers' types want a FloatTensor
        states: Any = own(embeddings[0], named["position_ids"], layout)
        return BaseModelOutputWithPast(last_hidden_state=states[None])

    return forward


def _random_copy(module: nn.Module) -> nn.Module:
    """Return a float32 copy with random weights that keep numbers around 1."""
    copied = copy.deepcopy(module).float()
    for parameter in copied.parameters():
        generator = torch.Generator(parameter.device).manual_seed(parameter.numel())
        if parameter.ndim > 1:
            parameter.uniform_(-2.0, 2.0, generator=generator).div_(parameter.shape[1] ** 0.5)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return copied
