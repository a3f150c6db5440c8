"""Decode steps of the native engine beside the time that reading the weights takes."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import never_end, sampling
from benchmarks.gpu.probe import copy_gb_per_s
from benchmarks.gpu.setting import (
    PeakMemory,
    device_of,
    lines,
    make_prompts,
    model_folder_of,
    rounded,
    synchronise,
)
from rlmed.core.types import Prompt, RolloutRequest
from rlmed.models.policy import Policy, load_policy
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from rollout.native.slots import StepPlan


def rollout(engine: NativeEngine, prompts: list[Prompt], group_size: int, max_tokens: int) -> tuple[float, list[float]]:
    """Return the seconds of the prompts and of each decode step but the last ones in flight."""
    earlier = engine.generated_tokens
    for index, prompt in enumerate(prompts):
        engine.submit(RolloutRequest(index, prompt, group_size, sampling(max_tokens, seed=index)))
    taken = []
    while engine.busy:
        start = time.perf_counter()
        engine.step()
        synchronise(engine.policy.device)
        taken.append(time.perf_counter() - start)
    expected = len(prompts) * group_size * max_tokens
    if engine.generated_tokens - earlier != expected:
        raise RuntimeError(f"the engine made {engine.generated_tokens - earlier} tokens instead of {expected}")
    return taken[0], taken[1:]


def bytes_a_step(policy: Policy, prompts: list[Prompt], group_size: int, completion: int) -> int:
    """Return what a step must read: weights of the language model, keys and values of all."""
    weights = sum(
        parameter.nbytes for name, parameter in policy.model.named_parameters() if ".visual." not in f".{name}"
    )
    embedding = policy.model.get_input_embeddings().weight
    if embedding is not policy.projection.weight:
        weights -= embedding.nbytes  # a few rows of it
    layers, kv_heads, width = policy.kv_shape
    tokens = sum(len(prompt.token_ids) + group_size * completion for prompt in prompts)
    return weights + 2 * layers * kv_heads * width * tokens * embedding.element_size()


def run(arguments: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], list[str]]:
    """Measure; return the results and the lines of a short table."""
    device, smoke = device_of(arguments), arguments.smoke
    folder = model_folder_of(arguments.model, scratch / arguments.model, device, 16 if smoke else 512)
    start = time.perf_counter()
    policy = load_policy(folder, dtype="float32" if smoke else "bfloat16", device=device)
    synchronise(device)
    loaded = time.perf_counter() - start
    never_end(policy)
    bandwidth = copy_gb_per_s(device, 2**20 if smoke else 2**30) * 1e9
    max_tokens = 4 if smoke else 128
    rows = []
    for groups, (variant, plan) in product((1,) if smoke else (2, 8, 16), variants(device).items()):
        prompts, _ = make_prompts(folder, groups, 80 if smoke else 640, scratch)
        limits = EngineLimits(max_completions=groups * 8, prefill_tokens=8192)
        engine = NativeEngine(policy, lambda ids: "", limits, plan)
        peak = PeakMemory(device)
        # kernels, then graphs are made: each shape of step is captured when it comes again
        for _ in range(0 if smoke else 2):
            rollout(engine, prompts, 8, max_tokens)
        peak.start()
        prefill, steps = rollout(engine, prompts, 8, max_tokens)
        step = sorted(steps)[len(steps) // 2]
        least = bytes_a_step(policy, prompts, 8, max_tokens // 2) / bandwidth
        rows.append(
            rounded(
                {
                    "rows": groups * 8,
                    "variant": variant,
                    "prefill_ms": 1e3 * prefill,
                    "step_ms": 1e3 * step,
                    "bytes_ms": 1e3 * least,
                    "times_bytes": step / least,
                    "tokens_per_s": groups * 8 * max_tokens / (prefill + sum(steps)),
                    "peak_gib": peak.gib(),
                }
            )
        )
    plans = {} if smoke else variants(device)
    trace = {variant: kernels_a_step(policy, plan, folder, scratch) for variant, plan in plans.items()}
    kernels = str(policy.decode_kernels())
    results = {"model": arguments.model, "load_s": round(loaded, 2), "kernels": kernels, "decode": rows}
    head = f"loaded in {loaded:.1f} s; fused: {kernels}; kernels a step: {trace}"
    return {**results, "kernels_a_step": trace}, [head, *lines(rows, list(rows[0]))]


def variants(device: torch.device) -> dict[str, StepPlan]:
    """Return the ways to take a step; on a CPU no graph, and kernels under Triton's interpreter."""
    plan = StepPlan.for_device(device)
    torchs = replace(plan, graphs=False, kernels=False)
    if device.type != "cuda":
        return {"eager": torchs, "fused": replace(plan, page_tokens=64, buckets=True, kernels=True)}
    return {
        "eager": torchs,
        "graph": replace(torchs, graphs=True),
        "fused eager": replace(torchs, kernels=True),
        "fused": plan,
    }


def kernels_a_step(policy: Policy, plan: StepPlan, folder: Path, scratch: Path) -> int:
    """Return how many kernels one decode step starts, from a profile of eight."""
    prompts, _ = make_prompts(folder, 2, 640, scratch)
    engine = NativeEngine(policy, lambda ids: "", EngineLimits(max_completions=16), plan)
    for index, prompt in enumerate(prompts):
        engine.submit(RolloutRequest(index, prompt, 8, sampling(64, seed=index)))
    for _ in range(10):
        engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(8):
            engine.step()
        torch.cuda.synchronize()
    return sum(entry.count for entry in profile.key_averages()) // 8
