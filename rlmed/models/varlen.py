"""Shared-prefix attention of a packed row, unpadded: a prompt's keys and values are read once.

Two attentions over sequences of different lengths are merged. The first is causal, over all prompts
and completions of the row, each a sequence of its own. In the second, which is not causal, all
completions of a group attend to their prompt. With outputs o₁, o₂ and log-sum-exps l₁, l₂ of their
scores, the attention of a completion's token to prompt and completion is

    l = log(exp l₁ + exp l₂),  o = exp(l₁ - l) o₁ + exp(l₂ - l) o₂.

Kernels drop the gradient of the log-sum-exp, so this sum must not be left to autograd: the gradient
would be wrong without an error. It isn't needed either. A weight of the merged attention is
exp(score - l), whichever part its key is in; hence each part's own backward pass, given the merged
o and l, returns its share of the exact gradients, and the shares add up.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rlmed.models.attention import HALF
from rlmed.models.varlen_backends import Backend, FlashAttn, Reference, Row, Spans, TorchFlash

log = logging.getLogger(__name__)

PROBE_GROUPS = ((5, (3, 1)), (130, (70, 9, 140)), (2, ()), (1, (1,)))
"""Shorter and longer than the kernels' blocks, and every kind of group."""
PROBE_TOLERANCE = 0.02
"""Some ten roundings to bfloat16, of 2**-9 each; what is wrong in kind is off by much more."""


@dataclass(frozen=True, slots=True)
class Suffixes:
    """The completions of a row and the prompts they continue."""

    spans: Spans
    """Queries: the completions of each group that has some. Keys: its prompt."""
    completion_tokens: Tensor
    """int64 [C]: row indices of the queries."""
    prompt_tokens: Tensor
    """int64 [P]: row indices of the keys."""

    @classmethod
    def build(cls, groups: Iterable[tuple[int, int, int]], device: torch.device | str) -> Suffixes | None:
        """Build from row indices (prompt, completions, end) by group; None without completions."""
        some = [group for group in groups if group[1] < group[2]]
        if not some:
            return None
        return cls(
            Spans.build(
                [end - middle for _, middle, end in some], [middle - start for start, middle, _ in some], device
            ),
            torch.cat([torch.arange(middle, end) for _, middle, end in some]).to(device),
            torch.cat([torch.arange(start, middle) for start, middle, _ in some]).to(device),
        )


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """A row of groups `[prompt | completion 1 | ... | completion G]`: an unpadded `PackedLayout`.

    Example:
        >>> layout = VarlenLayout.build([(49, (12, 30)), (51, ())], Reference())  # a group with two completions, and a prompt
        >>> layout.segments.query_starts.tolist(), layout.suffixes.spans.query_starts.tolist()
        ([0, 49, 61, 91, 142], [0, 42])
    """

    backend: Backend
    segments: Spans
    """Every prompt and every completion, in row order."""
    suffixes: Suffixes | None = None
    """None if no group has completions."""

    @classmethod
    def build(
        cls, groups: Sequence[tuple[int, Sequence[int]]], backend: Backend, device: torch.device | str = "cpu"
    ) -> VarlenLayout:
        """Lay out groups given as (prompt length >= 1, completion lengths) in row order."""
        segments = [length for prompt, completions in groups for length in (prompt, *completions) if length]
        ends = accumulate(prompt + sum(completions) for prompt, completions in groups)
        parts = (
            (end - sum(completions) - prompt, end - sum(completions), end)
            for (prompt, completions), end in zip(groups, ends, strict=True)
        )
        return cls(backend, Spans.build(segments, segments, device, causal=True), Suffixes.build(parts, device))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """See `rlmed.models.attention.AttentionLayout.attend`.

        Windows must be wider than the sequences: `Policy.packed_layout` sees to that.
        """
        width = query.shape[-1]
        if missing := -width % self.backend.width_multiple:
            query, key, value = (F.pad(tensor, (0, missing)) for tensor in (query, key, value))
        return _attend(query, key, value, self, scale)[..., :width]


class _SharedPrefix(torch.autograd.Function):
    """The merged attention of a row; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
        output, logsumexp = merged_forward(Row(query, key, value), layout, scale)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        row = Row(query, key, value)
        return *merged_backward(grad, row, output, logsumexp, ctx.layout, ctx.scale), None, None


# torch leaves `apply` untyped
_attend: Callable[[Tensor, Tensor, Tensor, VarlenLayout, float], Tensor] = _SharedPrefix.apply


def merged_forward(row: Row, layout: VarlenLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Return the merged output [N, H, D] and log-sum-exp [H, N]."""
    output, logsumexp = layout.backend.forward(row, layout.segments, scale)
    if layout.suffixes is not None:
        rows = layout.suffixes.completion_tokens
        part = row.select(rows, layout.suffixes.prompt_tokens)
        on_prompt, prompt_logsumexp = layout.backend.forward(part, layout.suffixes.spans, scale)
        own_logsumexp = logsumexp.index_select(1, rows)
        share = torch.sigmoid(prompt_logsumexp - own_logsumexp).T.unsqueeze(-1)
        merged = torch.lerp(output.index_select(0, rows).to(share.dtype), on_prompt.to(share.dtype), share)
        output.index_copy_(0, rows, merged.to(output.dtype))
        logsumexp.index_copy_(1, rows, torch.logaddexp(own_logsumexp, prompt_logsumexp))
    return output, logsumexp


def merged_backward(
    grad: Tensor, row: Row, output: Tensor, logsumexp: Tensor, layout: VarlenLayout, scale: float
) -> Row:
    """Return the gradients of the row; output and log-sum-exp are the merged ones."""
    gradients = layout.backend.backward(grad, row, output, logsumexp, layout.segments, scale)
    if layout.suffixes is not None:
        rows, prompt = layout.suffixes.completion_tokens, layout.suffixes.prompt_tokens
        shares = layout.backend.backward(
            grad.index_select(0, rows),
            row.select(rows, prompt),
            output.index_select(0, rows),
            logsumexp.index_select(1, rows),
            layout.suffixes.spans,
            scale,
        )
        for total, share, indices in zip(gradients, shares, (rows, prompt, prompt), strict=True):
            # not index_add_: it adds in half precision by atomic operations, in any order
            total.index_copy_(0, indices, total.index_select(0, indices) + share)
    return gradients


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """How this process computes the attention of packed rows."""

    backend: Backend | None
    """Of `VarlenLayout`; None: `PackedLayout`, which pads."""
    reason: str
    """Why, in a few words."""

    def __str__(self) -> str:
        """Name the way and the reason."""
        return f"{'padded' if self.backend is None else self.backend.name} ({self.reason})"


@functools.cache
def choose_attention(device: torch.device, dtype: torch.dtype, width: int) -> AttentionChoice:
    """Choose, once in a process, the attention of packed rows.

    Args:
        device: of the policy.
        dtype: of the policy.
        width: of its attention heads.
    """
    if device.type != "cuda":
        return AttentionChoice(None, "faster without CUDA")
    if dtype not in HALF:
        return AttentionChoice(None, f"flash attention has no {str(dtype).removeprefix('torch.')}")
    choice = first_that_works((FlashAttn, TorchFlash), device, dtype, width)
    if choice.backend is None:
        log.warning("attention of packed rows: %s; it takes more time and memory than without padding", choice)
    return choice


def first_that_works(
    candidates: Sequence[Callable[[], Backend]], device: torch.device, dtype: torch.dtype, width: int
) -> AttentionChoice:
    """Choose the first backend that is there and agrees with the reference on a small row."""
    failures: list[str] = []
    for candidate in candidates:
        name = candidate.name  # type: ignore[attr-defined]
        try:
            backend = candidate()
            error = probe(backend, device, dtype, width)
        except (ImportError, RuntimeError, TypeError, AttributeError) as failure:
            # the last two: a version whose functions are others
            failures.append(f"{name}: {str(failure).splitlines()[0]}")
            continue
        if error <= PROBE_TOLERANCE:
            return AttentionChoice(backend, "; ".join(failures) or "installed")
        failures.append(f"{name}: off by {error:.2g} in a probe")
    return AttentionChoice(None, "; ".join(failures))


@torch.no_grad()
def probe(backend: Backend, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Return the largest error of outputs and gradients on a small row; inf if not finite.

    It is relative to the largest entry.

    Raises:
        RuntimeError: if the device cannot run the backend.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(prompt + sum(lengths) for prompt, lengths in PROBE_GROUPS)
    width += -width % backend.width_multiple
    query, key, value, grad = (
        torch.randn(tokens, heads, width, generator=generator).to(dtype) for heads in (4, 2, 2, 4)
    )

    def compute(backend: Backend, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        layout = VarlenLayout.build(PROBE_GROUPS, backend, device)
        row = Row(query.to(device, dtype), key.to(device, dtype), value.to(device, dtype))
        output, logsumexp = merged_forward(row, layout, width**-0.5)
        gradients = merged_backward(grad.to(device, dtype), row, output, logsumexp, layout, width**-0.5)
        return [tensor.to("cpu", torch.float32) for tensor in (output, *gradients)]

    errors = [
        ((found - right).abs().max() / right.abs().max()).nan_to_num(torch.inf)
        for found, right in zip(
            compute(backend, device, dtype),
            compute(Reference(), torch.device("cpu"), torch.float32),
            strict=True,
        )
    ]
    return float(max(errors))
