"""Tokens a second of the native engine beside vLLM (compiled, eager) and transformers `generate`, alone and on a busy machine.

One workload is a model, a prompt length and a group size; 64 completions at a time for the embedded model (with images), 32 for
a text model. The sides take turns in one run. vLLM runs behind rlmed's adapter, with prefix caching, each engine in a process
of its own with as many threads as the others; nobody's completions end early.

    python -m benchmarks.rollout_vllm                                      # the embedded model
    python -m benchmarks.rollout_vllm --model FOLDER --max-tokens 32       # benchmarks/smollm2_folder.py writes one
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.common import (
    Side,
    add_arguments,
    alternate,
    find_model,
    make_renderer,
    model_facts,
    never_end,
    report,
    sampling,
    start,
    timed,
    write_examples,
    write_result,
)
from benchmarks.rollout_speed import generate_side, native_side
from rlmed.core.types import Example, Prompt, RolloutRequest
from rlmed.data.prompts import PromptRenderer
from rlmed.models.policy import load_policy
from rlmed.models.products import settle_products

ANSWER_SECONDS = 600
"""How long an engine may take to start, or to do its work once."""
FILLER = "the scan was taken without contrast, and the patient has been well until now. "


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """What every side does: `prompts` prompts of about `length` tokens, `group_size` completions each."""

    length: int
    group_size: int
    prompts: int
    max_tokens: int


def lengthened(renderer: PromptRenderer, example: Example, length: int) -> Prompt:
    """The prompt of `example` with so much text before its question that it has `length` tokens or a few more."""
    prompt = renderer.render(example)
    words = FILLER * length
    short, long = 0, len(words)
    while short < long:  # the least number of characters that suffices
        middle = (short + long) // 2
        prompt = renderer.render(dataclasses.replace(example, question=words[:middle] + example.question))
        short, long = (middle + 1, long) if len(prompt.token_ids) < length else (short, middle)
    return renderer.render(dataclasses.replace(example, question=words[:long] + example.question))


def make_prompts(renderer: PromptRenderer, scratch: Path, work: Workload, *, images: bool) -> list[Prompt]:
    """Different prompts of nearly one length."""
    examples = write_examples(scratch / "questions", work.prompts)
    kept = examples if images else [dataclasses.replace(example, image=None) for example in examples]
    return [lengthened(renderer, example, work.length) for example in kept]


def serve_vllm(
    folder: Path, prompts: Sequence[Prompt], work: Workload, eager: bool, threads: int, pipe: Connection
) -> None:
    """In a process of its own: an engine that does the work each time it is told to, and answers with the seconds."""
    from rollout.vllm_backend.engine import VllmEngine
    from rollout.vllm_backend.settings import VllmSettings

    settings = VllmSettings(
        dtype="float32",
        max_completions=work.prompts * work.group_size,
        max_prompt_tokens=max(len(prompt.token_ids) for prompt in prompts) + 8,
        max_tokens=work.max_tokens,
        enforce_eager=eager,
    )
    engine = VllmEngine(folder, settings)
    torch.set_num_threads(threads)
    engine._facts = dataclasses.replace(engine._facts, end_token_ids=())  # as `never_end` for the native engine
    pipe.send("ready")
    while pipe.recv() == "go":
        before, begun = engine.generated_tokens, time.perf_counter()
        for index, prompt in enumerate(prompts):
            engine.submit(RolloutRequest(index, prompt, work.group_size, sampling(work.max_tokens, seed=index)))
        while engine.busy:
            engine.step()
        seconds, made = time.perf_counter() - begun, engine.generated_tokens - before
        pipe.send(seconds if made == work.prompts * work.group_size * work.max_tokens else f"vLLM made {made} tokens")
    engine.close()


@contextmanager
def vllm_side(folder: Path, prompts: Sequence[Prompt], work: Workload, *, eager: bool, threads: int) -> Iterator[Side]:
    """A side whose engine lives in another process for as long as the context."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_vllm, args=(folder, prompts, work, eager, threads, theirs))
    process.start()

    def answer() -> Any:
        if not ours.poll(ANSWER_SECONDS):
            raise RuntimeError(f"vLLM did not answer within {ANSWER_SECONDS} s")
        return ours.recv()

    def side() -> float:
        ours.send("go")
        seconds = answer()
        if not isinstance(seconds, float):
            raise RuntimeError(f"{seconds}: it did not do the measured work")
        return seconds

    try:
        if (word := answer()) != "ready":
            raise RuntimeError(f"vLLM did not start: {word}")
        yield side
        ours.send("end")
        process.join(30)
    finally:
        process.kill()


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """One other process that wants a core for itself, if `wanted`."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(folder: Path, work: Workload, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Tokens a second of each side, alone and beside a busy process."""
    policy, renderer = load_policy(folder), make_renderer(folder)
    never_end(policy)
    images = policy.family.vision
    prompts = make_prompts(renderer, scratch, work, images=images)
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    pad = renderer.tokenizer.pad_token_id
    tokens = work.prompts * work.group_size * work.max_tokens
    found: dict[str, Any] = {**dataclasses.asdict(work), "prompt_tokens": [len(prompt.token_ids) for prompt in prompts]}
    with ExitStack() as stack:
        sides: dict[str, Callable[[], float]] = {
            "native": timed(native_side(policy, prompts, renderer.decode, work.group_size, work.max_tokens)),
            "generate": timed(generate_side(model, prompts, pad, work.group_size, work.max_tokens, "dynamic")),
        }
        for name in arguments.vllm:
            engine = vllm_side(folder, prompts, work, eager=name == "eager", threads=arguments.threads)
            sides[f"vllm_{name}"] = stack.enter_context(engine)
        for label, busy in (("alone", False), ("beside_one_busy_process", True)):
            with busy_process(busy):
                timings = alternate(sides, rounds=arguments.rounds)
            speeds = {name: round(tokens / one.median, 1) for name, one in timings.items()}
            ratio = round(speeds["native"] / max(speed for name, speed in speeds.items() if name != "native"), 3)
            found[label] = {"tokens_per_s": speeds, "native_to_best_other": ratio}
            report(f"{work} {label}: {speeds}, native / best other = {ratio}")
    return found


def main() -> None:
    """Measure and write `rollout_vllm_MODEL.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, rounds=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[54, 300], help="prompt tokens")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--completions", type=int, default=64, help="sampled at a time: prompts x group size")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--vllm", nargs="*", choices=["compiled", "eager"], default=["compiled", "eager"])
    arguments = parser.parse_args()
    start(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = find_model(arguments.model, Path(scratch))
        policy = load_policy(folder)
        facts = model_facts(policy, name) | {"onednn": settle_products(policy.model.config)}
        workloads = [
            Workload(length, size, arguments.completions // size, arguments.max_tokens)
            for length in arguments.lengths
            for size in arguments.group_sizes
        ]
        found = [measure(folder, work, arguments, Path(scratch) / str(i)) for i, work in enumerate(workloads)]
    result = {"rounds": arguments.rounds, "model": facts, "workloads": found}
    stem = f"rollout_vllm_{name.rpartition(':')[2]}"
    report(f"written to {write_result(stem, result, arguments.out)}")


if __name__ == "__main__":
    main()
