"""Ceilings of the device, and which of torch's own kernels are worth their name on it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv3d, linear, scaled_dot_product_attention

from benchmarks.gpu.setting import batched_seconds, device_of, lines, rounded, seconds, synchronise


def copy_gb_per_s(device: torch.device, size: int) -> float:
    """Return the bytes read and written in a second by a copy, in GB."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / batched_seconds(lambda: target.copy_(source), device, calls=10) / 1e9


def matmul_tflops(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Return the floating-point operations in a second of a square matrix product, in 1e12."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / batched_seconds(lambda: left @ right, device, calls=5) / 1e12


def ceilings(device: torch.device, smoke: bool) -> dict[str, Any]:
    """Return what the device can do at best."""
    size = 256 if smoke else 8192
    return rounded(
        {
            "copy_gb_per_s": copy_gb_per_s(device, 2**20 if smoke else 2**30),
            "matmul_bf16_tflops": matmul_tflops(device, size, torch.bfloat16),
            "matmul_fp32_tflops": matmul_tflops(device, size, torch.float32),
        }
    )


def patch_embedding(device: torch.device, patches: int) -> dict[str, Any]:
    """Compare the vision tower's convolution with the same product as a linear layer, bfloat16."""
    weight = torch.randn(1280, 3, 2, 14, 14, device=device).bfloat16() * 0.02
    rows = torch.randn(patches, 3 * 2 * 14 * 14, device=device).bfloat16()

    def convolution() -> Tensor:
        return conv3d(rows.view(-1, 3, 2, 14, 14), weight, stride=(2, 14, 14)).flatten(1)

    def product() -> Tensor:
        return linear(rows, weight.flatten(1))

    difference = (convolution().float() - product().float()).abs().max().item()
    return rounded(
        {
            "patches": patches,
            "conv3d_ms": 1e3 * seconds(convolution, device, rounds=3),
            "linear_ms": 1e3 * seconds(product, device, rounds=3),
            "largest_difference": difference,
        }
    )


def attention_backends(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """Yield the time of each backend by shape: causal, and with a mask over grouped heads."""
    backends = {"default": None} | {
        name: getattr(SDPBackend, name)
        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    }
    for length in (32, 64) if smoke else (512, 1024, 4096):
        for masked in (False, True):
            query = torch.randn(2, 12, length, 128, device=device).bfloat16()
            key, value = (torch.randn(2, 2, length, 128, device=device).bfloat16() for _ in range(2))
            mask = torch.ones(length, length, dtype=torch.bool, device=device).tril() if masked else None
            row: dict[str, Any] = {"length": length, "masked": masked}
            for name, backend in backends.items():
                row[name.lower()] = _milliseconds(query, key, value, mask, backend, device)
            yield rounded(row)


def _milliseconds(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: SDPBackend | None, device: torch.device
) -> float | None:
    """Return the time of one call, None where the backend refuses the shape."""

    def call() -> Tensor:
        chosen: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel(backend)
        with chosen:
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )

    try:
        return 1e3 * seconds(call, device, rounds=3)
    except RuntimeError:
        return None


def cudnn_plans(device: torch.device) -> dict[str, Any] | None:
    """Return the first call's time on new shapes and on a known one; None without cuDNN."""

    def call(length: int) -> None:
        row = torch.randn(1, 12, length, 128, device=device, dtype=torch.bfloat16)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            scaled_dot_product_attention(row, row, row, is_causal=True)

    try:
        call(256)
    except RuntimeError:
        return None
    new = [seconds(lambda length=length: call(length), device, rounds=1, warmup=0) for length in (321, 417, 533)]
    again = seconds(lambda: call(256), device, rounds=3)
    return rounded({"new_shape_ms": 1e3 * max(new), "known_shape_ms": 1e3 * again})


def masked_gradient_is_finite(device: torch.device, length: int) -> dict[str, bool | None]:
    """Return by backend whether dQ under a mask is finite, with a key length of 64 modulo 128."""
    found: dict[str, bool | None] = {}
    for name in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        query, key, value = (
            torch.randn(1, 4, length, 128, device=device).bfloat16().requires_grad_() for _ in range(3)
        )
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                scaled_dot_product_attention(query * 30, key * 10, value, attn_mask=mask).sum().backward()
        except RuntimeError:
            found[name.lower()] = None
            continue
        synchronise(device)
        found[name.lower()] = query.grad is not None and bool(query.grad.isfinite().all())
    return found


def run(arguments: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], list[str]]:
    """Measure; return the results and the lines of a short table."""
    device = device_of(arguments)
    attention = list(attention_backends(device, arguments.smoke))
    cuda: dict[str, Callable[[], Any]] = {
        "cudnn_plans": lambda: cudnn_plans(device),
        "finite_masked_gradient": lambda: masked_gradient_is_finite(device, 64 + 128 * 3),
    }
    results: dict[str, Any] = {
        "ceilings": ceilings(device, arguments.smoke),
        "patch_embedding": patch_embedding(device, 16 if arguments.smoke else 2048 * 4),
        "attention_ms": attention,
        **{name: probe() if device.type == "cuda" else None for name, probe in cuda.items()},
    }
    table = [f"{name}: {results[name]}" for name in ("ceilings", "patch_embedding", *cuda)]
    return results, [*table, *lines(attention, list(attention[0]))]
