"""Attention over sequences of different lengths that lie end to end, without padding: three ways to compute it.

Each returns the log-sum-exp of the scores beside the output. Its backward pass takes output and log-sum-exp as arguments, for
they need not be its own: where several attentions were merged, they are the merged ones, and what it returns is this
attention's share of the gradients (see `rlmed.models.varlen`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

FLASH_ATTN_VERSION = (2, 8)
"""Oldest flash-attn whose functions this module knows."""


@dataclass(frozen=True, slots=True)
class Spans:
    """S sequences of queries that lie end to end, and of the keys that each may attend to."""

    query_starts: Tensor
    """int32 [S + 1]: where each sequence of queries starts; the last is where they all end."""
    key_starts: Tensor
    """int32 [S + 1]: the same of its keys."""
    longest_query: int
    longest_key: int
    causal: bool = False
    """True: query i attends to keys 0..i of its sequence. False: to all of them."""

    @classmethod
    def build(
        cls,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int],
        device: torch.device | str,
        *,
        causal: bool = False,
    ) -> Spans:
        """Build from the lengths (each at least 1) of the sequences of queries and of keys, in row order."""
        starts = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (query_lengths, key_lengths)
        )
        return cls(*starts, max(query_lengths), max(key_lengths), causal)


class Backend(Protocol):
    """Computes attention over `Spans`. Queries are [N, H, D], keys and values [M, H_kv, D]; H is a multiple of H_kv."""

    name: str
    width_multiple: int
    """D must be a multiple of it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """Return the output [N, H, D] and the log-sum-exp [H, N] of the scaled scores, float32 for half precision."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value for `grad`, that of the output.

        With w = exp(scale q·k - logsumexp): dv = w grad, ds = w (grad·v - grad·output), dq = scale ds k, dk = scale ds q.
        """
        ...


class TorchFlash:
    """FlashAttention as it is built into torch; CUDA and half precision only."""

    name = "torch's flash attention"
    width_multiple = 8

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        # arguments: ..., dropout, causal, return_debug_mask
        output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *_limits(spans), 0.0, spans.causal, False, scale=scale
        )
        return output, logsumexp

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        unused = query.new_empty(0)  # state of the random numbers, which only dropout reads
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, query, key, value, output, logsumexp, *_limits(spans), 0.0, spans.causal, unused, unused, scale=scale
        )
        return gradients


def _limits(spans: Spans) -> tuple[Tensor, Tensor, int, int]:
    """Return the spans in the order of FlashAttention's arguments."""
    return spans.query_starts, spans.key_starts, spans.longest_query, spans.longest_key


class FlashAttn:
    """The flash-attn package; CUDA and half precision only."""

    name = "flash-attn"
    width_multiple = 8

    def __init__(self) -> None:
        """Import the package.

        Raises:
            ImportError: if it is missing, too old, or built for another torch.
        """
        try:
            version = importlib.metadata.version("flash-attn")
        except importlib.metadata.PackageNotFoundError:
            raise ImportError("not installed") from None
        if tuple(int(part) for part in version.split(".")[:2]) < FLASH_ATTN_VERSION:
            raise ImportError(f"{version} is older than {'.'.join(map(str, FLASH_ATTN_VERSION))}")
        self._functions: Any = importlib.import_module("flash_attn.flash_attn_interface")

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        output, logsumexp, *_ = self._functions._flash_attn_varlen_forward(
            query, key, value, *_limits(spans), dropout_p=0.0, softmax_scale=scale, causal=spans.causal
        )
        return output, logsumexp

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        self._functions._flash_attn_varlen_backward(
            grad,
            query,
            key,
            value,
            output,
            logsumexp,
            *gradients,
            *_limits(spans),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=spans.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients


class Reference:
    """The definition, one sequence after the other, on any device and in any dtype; half precision is computed in float32."""

    name = "reference"
    width_multiple = 1

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        dtype = _accumulator(query)
        output = torch.empty_like(query)
        logsumexp = torch.empty(query.shape[1], len(query), dtype=dtype, device=query.device)
        for own, keys in _sequences(spans):
            scores = _scores(query[own], key[keys], spans.causal, scale)
            logsumexp[:, own] = scores.logsumexp(-1)
            weights = torch.exp(scores - logsumexp[:, own].unsqueeze(-1))
            output[own] = torch.einsum("hqk,khd->qhd", weights, _per_head(value[keys], query)).to(query.dtype)
        return output, logsumexp

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsumexp: Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        dtype = _accumulator(query)
        grad_query, grad_key, grad_value = (torch.zeros_like(tensor, dtype=dtype) for tensor in (query, key, value))
        for own, keys in _sequences(spans):
            own_grad, own_query = grad[own].to(dtype), query[own].to(dtype)
            heads_key, heads_value = (_per_head(tensor[keys], query) for tensor in (key, value))
            weights = torch.exp(_scores(query[own], key[keys], spans.causal, scale) - logsumexp[:, own].unsqueeze(-1))
            mean = (own_grad * output[own].to(dtype)).sum(-1).T.unsqueeze(-1)
            grad_scores = scale * weights * (torch.einsum("qhd,khd->hqk", own_grad, heads_value) - mean)
            grad_query[own] = torch.einsum("hqk,khd->qhd", grad_scores, heads_key)
            grad_key[keys] = _summed(torch.einsum("hqk,qhd->khd", grad_scores, own_query), key)
            grad_value[keys] = _summed(torch.einsum("hqk,qhd->khd", weights, own_grad), key)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _accumulator(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _sequences(spans: Spans) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each sequence of queries and of its keys."""
    query_starts, key_starts = spans.query_starts.tolist(), spans.key_starts.tolist()
    for index in range(len(query_starts) - 1):
        yield slice(*query_starts[index : index + 2]), slice(*key_starts[index : index + 2])


def _per_head(rows: Tensor, query: Tensor) -> Tensor:
    """Repeat keys or values [L, H_kv, D] for the H heads of the query [N, H, D]."""
    return rows.to(_accumulator(query)).repeat_interleave(query.shape[1] // rows.shape[1], dim=1)


def _summed(heads: Tensor, key: Tensor) -> Tensor:
    """Sum [L, H, D] over the heads that share a head of the key [M, H_kv, D]."""
    return heads.unflatten(1, (key.shape[1], -1)).sum(2)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """Return the scores [H, L_q, L_k] of one sequence, -inf where it may not attend."""
    scores = scale * torch.einsum("qhd,khd->hqk", query.to(_accumulator(query)), _per_head(key, query))
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
        scores.masked_fill_(hidden, -torch.inf)
    return scores
