"""Each Triton kernel: its error against float64, its time, and the bytes' time on this device."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.probe import copy_gb_per_s
from benchmarks.gpu.setting import batched_seconds, device_of, lines, rounded


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at one shape."""

    name: str
    call: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    """float64."""
    size: int
    """Bytes that any implementation reads and writes."""


def element_wise(rows: int, hidden: int, intermediate: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield norm and gate."""
    from rlmed.models.kernels.layer import add_rms_norm, silu_mul

    residual, delta = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(2))
    weight = torch.ones(hidden, device=device, dtype=dtype)
    zero = torch.zeros_like(delta)
    wide = (residual.double() + delta.double()).to(dtype).double()
    summed = residual + delta
    yield Case(
        "add_rms_norm",
        lambda: add_rms_norm(summed, zero, weight, 1e-6),
        lambda: wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt(),
        4 * residual.nbytes,
    )
    gate_up = torch.randn(rows, 2 * intermediate, device=device).to(dtype)
    gate, up = gate_up.double().chunk(2, 1)
    yield Case(
        "silu_mul",
        lambda: silu_mul(gate_up),
        lambda: torch.nn.functional.silu(gate) * up,
        gate_up.nbytes * 3 // 2,
    )


def attention(
    groups: int, members: int, lengths: tuple[int, int], heads: tuple[int, int, int], device: torch.device, dtype: Any
) -> Iterator[Case]:
    """Yield the attention of a step over prompts, and over completions, in one page each."""
    from rlmed.models.kernels.attention import Parts, attend, merge

    query_heads, kv_heads, width = heads
    rows = groups * members
    query = torch.randn(rows, query_heads, width, device=device).to(dtype)
    by_group = torch.arange(rows, dtype=torch.int32, device=device).view(groups, members)
    for name, length, table in (
        ("prompt", lengths[0], by_group),
        ("completion", lengths[1], by_group.view(rows, 1)),
    ):
        count = len(table)
        keys, values = (torch.randn(count, kv_heads, length, width, device=device).to(dtype) for _ in range(2))
        pages = torch.arange(count, dtype=torch.int32, device=device).unsqueeze(1)
        filled = torch.full((count,), length, dtype=torch.int32, device=device)
        for splits in (1, 4):

            def call(
                keys: Tensor = keys,
                values: Tensor = values,
                pages: Tensor = pages,
                filled: Tensor = filled,
                table: Tensor = table,
                splits: int = splits,
            ) -> Tensor:
                parts = Parts(splits, query)
                attend(query, keys, values, pages, filled, table, width**-0.5, parts, 0, splits)
                return merge(parts, dtype)

            def exact(keys: Tensor = keys, values: Tensor = values, table: Tensor = table) -> Tensor:
                group = torch.arange(len(table), device=device).repeat_interleave(table.shape[1])
                repeats = query_heads // kv_heads
                wide = [tensor.double().repeat_interleave(repeats, 1)[group] for tensor in (keys, values)]
                scores = torch.einsum("rhd,rhtd->rht", query.double(), wide[0]) * width**-0.5
                return torch.einsum("rht,rhtd->rhd", scores.softmax(-1), wide[1])

            yield Case(f"attend_{name}_{length}_splits_{splits}", call, exact, 2 * keys.nbytes + 2 * query.nbytes)


def sampler(rows: int, vocabulary: int, device: torch.device) -> Case:
    """Return the sampler, of which the log-probabilities are compared."""
    from rlmed.models.kernels.sampling import sample

    logits = torch.randn(rows, vocabulary, device=device) * 3
    uniform = torch.rand(rows, device=device, dtype=torch.float64)
    temperature, greedy = torch.ones(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
    tokens = sample(logits, uniform, temperature, greedy)[0]
    return Case(
        f"sample_{vocabulary}",
        lambda: sample(logits, uniform, temperature, greedy)[1],
        lambda: logits.double().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1),
        logits.nbytes,
    )


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the kernels at Qwen2-VL-2B's shapes, or at small ones."""
    # Triton's interpreter has no rounding to bfloat16
    dtype = torch.float16 if smoke else torch.bfloat16
    if smoke:
        yield from element_wise(4, 64, 96, device, dtype)
        yield from attention(2, 4, (20, 9), (4, 2, 16), device, dtype)
        yield sampler(4, 2500, device)
        return
    for groups in (2, 8):
        yield from element_wise(8 * groups, 1536, 8960, device, dtype)
        yield from attention(groups, 8, (600, 256), (12, 2, 128), device, dtype)
        yield sampler(8 * groups, 151936, device)


def measure(case: Case, device: torch.device, bandwidth: float, smoke: bool) -> dict[str, Any]:
    """Return error, time, and the share of the bytes' time in it."""
    exact, found = case.exact(), case.call().double()
    taken = batched_seconds(case.call, device, calls=1 if smoke else 50)
    return rounded(
        {
            "kernel": case.name,
            "relative_error": float((found - exact).abs().max() / exact.abs().max()),
            "us": 1e6 * taken,
            "bytes_us": 1e6 * case.size / bandwidth,
            "share": case.size / bandwidth / taken,
        }
    )


def run(arguments: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], list[str]]:
    """Measure; return the results and the lines of a short table."""
    if importlib.util.find_spec("triton") is None:
        return {"skipped": "triton is not installed"}, ["skipped: triton is not installed"]
    device = device_of(arguments)
    bandwidth = copy_gb_per_s(device, 2**20 if arguments.smoke else 2**30) * 1e9
    rows = [measure(case, device, bandwidth, arguments.smoke) for case in cases(device, arguments.smoke)]
    return {"kernels": rows}, lines(rows, list(rows[0]))
