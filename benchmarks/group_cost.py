"""What does a group of G completions cost? The sweep of `rollout_speed --sweep`.

A prompt of P tokens and G completions of T tokens are P + G*T tokens of work where the prompt is
computed once, and G*(P + T) where each completion computes it. One group at a time is sampled for
every P and G, and

    seconds = a + b*P + c*G*T        the prompt is paid once
    seconds = a + b*G*P + c*G*T      each completion pays it

are fitted by least squares: the law with the smaller residual is the one that holds. `--caches
dynamic` sweeps `generate` too, as the contrast.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.common import (
    Side,
    Timing,
    alternate,
    find_model,
    fit,
    make_renderer,
    model_facts,
    never_end,
    report,
    timed,
    write_result,
)
from benchmarks.gpu.setting import GEOMETRIES, model_folder_of
from benchmarks.rollout_sides import Workload, generate_side, make_prompts, native_side
from rlmed.models.policy import Policy, load_policy

LENGTHS, GROUP_SIZES = (54, 300, 800), (2, 4, 8, 16, 32)
VISUAL_TOKENS = 16
ONCE, EACH = "prompt_paid_once", "prompt_paid_by_each_completion"


def load(name: str | None, scratch: Path) -> tuple[Path, str, Policy]:
    """Load a folder, the embedded model, or a real geometry with random bfloat16 weights."""
    if name in GEOMETRIES:
        folder = model_folder_of(name, scratch / name, torch.device("cpu"), VISUAL_TOKENS)
        return folder, name, load_policy(folder, dtype="bfloat16")
    folder, name = find_model(name, scratch)
    return folder, name, load_policy(folder)


def sweep(
    folder: Path, policy: Policy, works: Sequence[Workload], caches: Sequence[str], rounds: int, scratch: Path
) -> dict[str, list[dict[str, Any]]]:
    """Measure every workload on each side; return each side's points."""
    never_end(policy)
    renderer, images = make_renderer(folder), policy.family.vision
    pad = renderer.tokenizer.pad_token_id
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=policy.dtype, attn_implementation="sdpa").eval() if caches else None
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in ("native", *(f"generate_{one}" for one in caches))}
    for number, work in enumerate(works):
        prompts = make_prompts(renderer, scratch / str(number), work, images=images)
        amount = (work.group_size, work.max_tokens)
        sides: dict[str, Side] = {"native": timed(native_side(policy, prompts, renderer.decode, *amount))}
        for cache in caches:
            sides[f"generate_{cache}"] = timed(generate_side(model, prompts, pad, *amount, cache))
        timings = alternate(sides, rounds=rounds)
        for name, timing in timings.items():
            points[name].append(_point(work, timing))
        report(f"P = {work.length}, G = {work.group_size}: {_seconds(timings)}")
    return points


def fit_laws(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fit both laws to the seconds of a side; return coefficients and residuals by law."""
    prompt = [point["length"] for point in points]
    sampled = [point["group_size"] * point["max_tokens"] for point in points]
    padded = [point["group_size"] * point["length"] for point in points]
    seconds = [point["seconds"]["median_s"] for point in points]
    return {
        name: fit({"group": [1.0] * len(points), "prompt_token": tokens, "completion_token": sampled}, seconds)
        for name, tokens in ((ONCE, prompt), (EACH, padded))
    }


def describe(name: str, laws: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line a law."""
    lines = []
    for law, tokens in ((ONCE, "P"), (EACH, "G*P")):
        found = laws[law]
        group, prompt, completion = (found[key] for key in ("group", "prompt_token", "completion_token"))
        lines.append(
            f"{name}: {1e3 * group:.1f} ms + {1e6 * prompt:.1f} us * {tokens} + {1e6 * completion:.1f} us * G*T, "
            f"residual {100 * found['residual']:.1f} % of the mean (R2 {found['r2']:.4f}): {law.replace('_', ' ')}"
        )
    return lines


def run(arguments: argparse.Namespace, scratch: Path) -> None:
    """Sweep, fit and write `rollout_sweep_MODEL.json`."""
    folder, name, policy = load(arguments.model, scratch)
    facts = model_facts(policy, name)
    works = [
        Workload(length, size, 1, arguments.max_tokens)
        for length in arguments.lengths or LENGTHS
        for size in arguments.group_sizes or GROUP_SIZES
    ]
    points = sweep(folder, policy, works, arguments.caches, arguments.rounds, scratch)
    laws = {side: fit_laws(found) for side, found in points.items()}
    for side, fitted in laws.items():
        report("\n".join(describe(side, fitted)))
    result = {"rounds": arguments.rounds, "model": facts, "laws": laws, "points": points}
    path = write_result(f"rollout_sweep_{name.rpartition(':')[2]}", result, arguments.out)
    report(f"written to {path}")


def _point(work: Workload, timing: Timing) -> dict[str, Any]:
    amount = {"length": work.length, "group_size": work.group_size, "max_tokens": work.max_tokens}
    return amount | {"seconds": timing.summary()}


def _seconds(timings: Mapping[str, Timing]) -> str:
    return ", ".join(f"{name} {timing.median:.3f} s" for name, timing in timings.items())
