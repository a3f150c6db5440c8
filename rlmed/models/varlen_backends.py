"""Attention over sequences of different lengths, end to end without padding: three ways.

Each returns the log-sum-exp of the scores beside the output. Its backward pass takes output and
log-sum-exp as arguments, for they need not be its own: where several attentions were merged, they
are the merged ones, and what it returns is this attention's share of the gradients (see
`rlmed.models.varlen`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

FLASH_ATTN_VERSION = (2, 8)
"""Oldest flash-attn whose functions this module knows."""


class Row(NamedTuple):
    """Inputs of an attention, or their gradients; H is a multiple of H_kv."""

    query: Tensor
    """[N, H, D]."""
    key: Tensor
    """[M, H_kv, D]."""
    value: Tensor
    """[M, H_kv, D]."""

    def select(self, queries: Tensor, keys: Tensor) -> Row:
        """Copy the given tokens (int64) of the query, and of key and value."""
        return Row(
            self.query.index_select(0, queries), self.key.index_select(0, keys), self.value.index_select(0, keys)
        )


@dataclass(frozen=True, slots=True)
class Spans:
    """S sequences of queries that lie end to end, and of the keys that each may attend to."""

    query_starts: Tensor
    """int32 [S + 1]: where each sequence of queries starts; the last is where they all end."""
    key_starts: Tensor
    """int32 [S + 1]: the same of its keys."""
    longest_query: int
    """At least 2: with 1, FlashAttention takes its decoding kernels, which regroup the heads."""
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
        """Build from the lengths (at least 1) of sequences of queries and of keys, in row order."""
        query_starts, key_starts = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (query_lengths, key_lengths)
        )
        return cls(query_starts, key_starts, max(2, *query_lengths), max(key_lengths), causal)


class Backend(Protocol):
    """Computes the attention of a row over its spans."""

    name: str
    width_multiple: int
    """D must be a multiple of it."""

    def forward(self, row: Row, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """Return the output [N, H, D] and the log-sum-exp [H, N] of the scaled scores.

        The log-sum-exp is float32 for half precision.
        """
        ...

    def backward(self, grad: Tensor, row: Row, output: Tensor, logsumexp: Tensor, spans: Spans, scale: float) -> Row:
        """Return the gradients of the row for `grad`, that of the output.

        With w = exp(scale q·k - logsumexp): dv = w grad, ds = w (grad·v - grad·output), dq = scale
        ds k, dk = scale ds q.
        """
        ...


class TorchFlash:
    """FlashAttention as it is built into torch; CUDA and half precision only."""

    name = "torch's flash attention"
    width_multiple = 8

    def forward(self, row: Row, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        # arguments: ..., dropout, causal, return_debug_mask
        output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
            *row, *_limits(spans), 0.0, spans.causal, False, scale=scale
        )
        return output, logsumexp

    def backward(self, grad: Tensor, row: Row, output: Tensor, logsumexp: Tensor, spans: Spans, scale: float) -> Row:
        """See `Backend.backward`."""
        unused = grad.new_empty(0)  # state of the random numbers, which only dropout reads
        gradients = torch.ops.aten._flash_attention_backward(
            grad, *row, output, logsumexp, *_limits(spans), 0.0, spans.causal, unused, unused, scale=scale
        )
        return Row(*gradients)


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

    def forward(self, row: Row, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        output, logsumexp, *_ = self._functions._flash_attn_varlen_forward(
            *row, *_limits(spans), dropout_p=0.0, softmax_scale=scale, causal=spans.causal
        )
        return output, logsumexp

    def backward(self, grad: Tensor, row: Row, output: Tensor, logsumexp: Tensor, spans: Spans, scale: float) -> Row:
        """See `Backend.backward`."""
        gradients = Row(*map(torch.empty_like, row))
        self._functions._flash_attn_varlen_backward(
            grad,
            *row,
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
    """The definition, a sequence at a time, any device, any dtype; half precision uses float32."""

    name = "reference"
    width_multiple = 1

    def forward(self, row: Row, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`."""
        output = torch.empty_like(row.query)
        exact = _exact(row)
        logsumexp = exact.query.new_empty(row.query.shape[1], len(row.query))
        for own, keys in _sequences(spans):
            scores = _scores(exact.query[own], exact.key[keys], spans.causal, scale)
            logsumexp[:, own] = scores.logsumexp(-1)
            weights = torch.exp(scores - logsumexp[:, own].unsqueeze(-1))
            output[own] = torch.einsum("hqk,khd->qhd", weights, exact.value[keys]).to(output.dtype)
        return output, logsumexp

    def backward(self, grad: Tensor, row: Row, output: Tensor, logsumexp: Tensor, spans: Spans, scale: float) -> Row:
        """See `Backend.backward`."""
        query, key, value = exact = _exact(row)
        grad, output = grad.to(query.dtype), output.to(query.dtype)
        grad_query, grad_key, grad_value = map(torch.zeros_like, exact)
        for own, keys in _sequences(spans):
            scores = _scores(query[own], key[keys], spans.causal, scale)
            weights = torch.exp(scores - logsumexp[:, own].unsqueeze(-1))
            mean = (grad[own] * output[own]).sum(-1).T.unsqueeze(-1)
            grad_scores = scale * weights * (torch.einsum("qhd,khd->hqk", grad[own], value[keys]) - mean)
            grad_query[own] = torch.einsum("hqk,khd->qhd", grad_scores, key[keys])
            grad_key[keys] = torch.einsum("hqk,qhd->khd", grad_scores, query[own])
            grad_value[keys] = torch.einsum("hqk,qhd->khd", weights, grad[own])
        # sum over the heads that share a key
        shared = (torch.unflatten(heads, 1, (row.key.shape[1], -1)).sum(2) for heads in (grad_key, grad_value))
        return Row(*(tensor.to(row.query.dtype) for tensor in (grad_query, *shared)))


def _exact(row: Row) -> Row:
    """Return the row in float32, or float64 if it is, keys and values repeated for every head."""
    dtype = torch.float64 if row.query.dtype == torch.float64 else torch.float32
    repeats = row.query.shape[1] // row.key.shape[1]
    key, value = (tensor.to(dtype).repeat_interleave(repeats, dim=1) for tensor in (row.key, row.value))
    return Row(row.query.to(dtype), key, value)


def _sequences(spans: Spans) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each sequence of queries and of its keys."""
    for own, keys in zip(pairwise(spans.query_starts.tolist()), pairwise(spans.key_starts.tolist()), strict=True):
        yield slice(*own), slice(*keys)


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """Return the scores [H, L_q, L_k] of one sequence, -inf where it may not attend."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores
