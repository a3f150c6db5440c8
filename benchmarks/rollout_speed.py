"""How many tokens a second does the native engine sample, beside transformers `generate` and vLLM?

One workload is a model, a prompt length and a group size, 64 completions at a time; temperature 1,
and nobody's completions end early. The sides take turns. `generate` need not return
log-probabilities and may sample vision tokens; the engine returns the one and bans the other. vLLM,
where it is installed, runs behind rlmed's adapter, with prefix caching, each engine in a process of
its own with as many threads as the others.

    python -m benchmarks.rollout_speed                     # the embedded model, with its images
    python -m benchmarks.rollout_speed --model FOLDER --completions 32 --max-tokens 32
    python -m benchmarks.rollout_speed --sweep             # what one group costs, see group_cost.py
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import multiprocessing
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks import group_cost
from benchmarks.common import (
    Side,
    Timing,
    add_arguments,
    alternate,
    find_model,
    make_renderer,
    model_facts,
    never_end,
    report,
    start,
    timed,
    write_result,
)
from benchmarks.rollout_sides import (
    Workload,
    busy_process,
    generate_side,
    linear_layers_side,
    make_prompts,
    native_side,
    serve_vllm,
    served_side,
)
from rlmed.models.cpu.products import settle_products
from rlmed.models.policy import load_policy

OURS = ("native", "linear_layers")
"""Sides that are not another engine."""
CACHES = ("dynamic", "static")
ENGINES = ("compiled", "eager")
LENGTHS, GROUP_SIZES = (54, 300), (8, 16)


def summarise(timings: Mapping[str, Timing], tokens: int) -> dict[str, Any]:
    """Tokens a second of each side (by median), and the native engine's lead on the others.

    `products` is the lead of decode steps' linear layers alone, as torch's libraries compute them:
    an engine that leads by more has faster products.
    """
    best = min((name for name in timings if name not in OURS), key=lambda name: timings[name].median)
    return {
        "tokens_per_s": {name: round(tokens / one.median, 1) for name, one in timings.items()},
        "seconds": {name: one.summary() for name, one in timings.items()},
        "best_other": best,
        "ratio": round(timings[best].median / timings["native"].median, 3),
        "products": round(timings[best].median / timings["linear_layers"].median, 3),
    }


def compare(folder: Path, work: Workload, label: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Tokens a second of each side; `label` says what else the machine does."""
    policy, renderer = load_policy(folder), make_renderer(folder)
    never_end(policy)
    vision = policy.family.vision
    prompts = make_prompts(renderer, scratch, work, images=vision and not arguments.text)
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    pad = renderer.tokenizer.pad_token_id
    with ExitStack() as stack:
        sides: dict[str, Side] = {
            "native": timed(native_side(policy, prompts, renderer.decode, work.group_size, work.max_tokens)),
            "linear_layers": timed(linear_layers_side(policy, work)),
        }
        for cache in arguments.caches:
            side = generate_side(model, prompts, pad, work.group_size, work.max_tokens, cache)
            sides[f"generate_{cache}"] = timed(side)
        for name in arguments.vllm:
            engine = served_side(serve_vllm, folder, prompts, work, name == "eager", arguments.threads)
            sides[f"vllm_{name}"] = stack.enter_context(engine)
        timings = alternate(sides, rounds=arguments.rounds)
    found = summarise(timings, work.prompts * work.group_size * work.max_tokens)
    speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in found["tokens_per_s"].items())
    report(
        f"{work.prompts} prompts of {work.length} tokens, G = {work.group_size}, {label}: {speeds} tokens/s; "
        f"native / best other = {found['ratio']:.2f} (torch's products alone: {found['products']:.2f})"
    )
    return found


def measure(folder: Path, work: Workload, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Tokens a second of each side, alone and with --busy beside a busy process."""
    found: dict[str, Any] = dataclasses.asdict(work)
    # OpenMP reads how its threads shall wait when torch is loaded, so each has a process of its own
    context = multiprocessing.get_context("spawn")
    for label, busy in (("alone", False), ("beside_one_busy_process", True))[: 1 + arguments.busy]:
        with busy_process(busy), ProcessPoolExecutor(1, context, initializer=start, initargs=(arguments,)) as process:
            found[label] = process.submit(compare, folder, work, label, arguments, scratch / label).result()
    return found


def run(folder: Path, name: str, arguments: argparse.Namespace, scratch: Path) -> None:
    """Measure every workload and write `rollout_speed_MODEL.json`."""
    policy = load_policy(folder)
    facts = model_facts(policy, name) | {
        "onednn": settle_products(policy.model.config),
        "decode": str(policy.decode_kernels()),
    }
    del policy
    found: list[dict[str, Any]] = []
    for length in arguments.lengths or LENGTHS:
        for size in arguments.group_sizes or GROUP_SIZES:
            work = Workload(length, size, arguments.completions // size, arguments.max_tokens)
            found.append(measure(folder, work, arguments, scratch / str(len(found))))
            # after each workload, so that a sweep that is cut short leaves what it has measured
            result = {"rounds": arguments.rounds, "images": not arguments.text, "model": facts, "workloads": found}
            path = write_result(f"rollout_speed_{name.rpartition(':')[2]}", result, arguments.out)
            report(f"written to {path}")


def main() -> None:
    """Compare the engines or, with --sweep, fit what a group costs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, rounds=3)
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt tokens (default 54 300; sweep: 54 300 800)")
    parser.add_argument("--group-sizes", type=int, nargs="+", help="default 8 16; sweep: 2 4 8 16 32")
    parser.add_argument("--completions", type=int, default=64, help="sampled at a time: prompts x group size")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--text", action="store_true", help="the same questions without their images")
    parser.add_argument("--caches", nargs="*", choices=CACHES, default=["dynamic"], help="of generate")
    installed = list(ENGINES) if importlib.util.find_spec("vllm") else []
    parser.add_argument("--vllm", nargs="*", choices=ENGINES, default=installed, help="default: both where installed")
    parser.add_argument("--busy", action="store_true", help="once more, beside a process that wants a core")
    parser.add_argument("--sweep", action="store_true", help="what a group costs instead of the comparison")
    arguments = parser.parse_args()
    if not arguments.sweep and not arguments.caches and not arguments.vllm:
        parser.error("--caches and --vllm leave nothing to compare with")
    start(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.sweep:
            group_cost.run(arguments, Path(scratch))
        else:
            folder, name = find_model(arguments.model, Path(scratch))
            run(folder, name, arguments, Path(scratch))


if __name__ == "__main__":
    main()
