"""Tokens a second of the native engine beside vLLM (compiled, eager) and transformers `generate`.

All are measured alone and on a busy machine.

One workload is a model, a prompt length and a group size; 64 completions at a time for the embedded
model (with images), 32 for a text model. The sides take turns. vLLM runs behind rlmed's adapter,
with prefix caching, each engine in a process of its own with as many threads as the others;
nobody's completions end early.

    python -m benchmarks.rollout_vllm                                      # the embedded model
    python -m benchmarks.rollout_vllm --model FOLDER --max-tokens 32       # benchmarks/smollm2_folder.py writes one
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.common import (
    Side,
    Timing,
    add_arguments,
    alternate,
    find_model,
    make_renderer,
    model_facts,
    never_end,
    render_prompts,
    report,
    sampling,
    start,
    timed,
    write_examples,
    write_result,
)
from benchmarks.learner_memory import QUESTION_TOKENS, TURN_TOKENS, stretch
from benchmarks.rollout_speed import generate_side, native_side
from rlmed.core.types import Prompt, RolloutRequest
from rlmed.data.prompts import PromptRenderer
from rlmed.models.cpu.linear import PackedWeights
from rlmed.models.cpu.products import settle_products
from rlmed.models.policy import Policy, load_policy

OURS = ("native", "linear_layers")
"""Sides that are not another engine."""
ANSWER_SECONDS = 600
"""How long an engine may take to start, or to do its work once."""

BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"
"""Wants a core for itself, and ends with the benchmark even where that is killed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """What every side does: `prompts` prompts of `length` tokens, `group_size` completions each."""

    length: int
    group_size: int
    prompts: int
    max_tokens: int


def of_length(prompt: Prompt, length: int, seed: int) -> Prompt:
    """The prompt with exactly `length` tokens.

    Text after an image is repeated, or some of it left out. A prompt without an image becomes its
    own tokens in random order: what they say matters to no side, and no two prompts begin alike,
    which vLLM would compute once.

    Raises:
        SystemExit: when the image leaves no room.
    """
    if not prompt.image_inputs:
        shuffled = np.random.default_rng(seed).permutation(prompt.token_ids)
        return dataclasses.replace(prompt, token_ids=np.resize(shuffled, length))
    surplus = len(prompt.token_ids) - length
    if surplus <= 0:
        return stretch(prompt, length)
    if surplus > QUESTION_TOKENS:
        raise SystemExit(f"a prompt with its image has {len(prompt.token_ids)} tokens, --lengths {length} are too few")
    ending = slice(-TURN_TOKENS - surplus, -TURN_TOKENS)
    return dataclasses.replace(prompt, token_ids=np.delete(prompt.token_ids, ending))


def make_prompts(renderer: PromptRenderer, scratch: Path, work: Workload, *, images: bool) -> list[Prompt]:
    """Different prompts of the workload's length."""
    rendered = render_prompts(renderer, write_examples(scratch / "questions", work.prompts), images=images)
    return [of_length(prompt, work.length, seed) for seed, prompt in enumerate(rendered)]


def serve_vllm(
    folder: Path, prompts: Sequence[Prompt], work: Workload, eager: bool, threads: int, pipe: Connection
) -> None:
    """An engine in its own process: works each time it is told to, and answers with the seconds."""
    from rollout.vllm_backend.engine import VllmEngine
    from rollout.vllm_backend.settings import VllmSettings

    settings = VllmSettings(
        dtype="float32",
        max_completions=work.prompts * work.group_size,
        max_prompt_tokens=max(len(prompt.token_ids) for prompt in prompts) + 8,
        max_tokens=work.max_tokens,
        enforce_eager=eager,
    )
    # before the engine is made, which plans by it and then takes the setting away
    torch.set_num_threads(threads)
    engine = VllmEngine(folder, settings)
    if torch.get_num_threads() != threads:
        raise RuntimeError(f"vLLM runs on {torch.get_num_threads()} threads, the other sides on {threads}")
    # as `never_end` for the native engine
    engine._facts = dataclasses.replace(engine._facts, end_token_ids=())
    pipe.send("ready")
    while pipe.recv() == "go":
        # as after a push, which precedes every batch in training: no prompt is found in the cache
        engine._epoch += 1
        before, begun = engine.generated_tokens, time.perf_counter()
        for index, prompt in enumerate(prompts):
            engine.submit(RolloutRequest(index, prompt, work.group_size, sampling(work.max_tokens, seed=index)))
        while engine.busy:
            engine.step()
        seconds, made = time.perf_counter() - begun, engine.generated_tokens - before
        pipe.send(seconds if made == work.prompts * work.group_size * work.max_tokens else f"vLLM made {made} tokens")
    engine.close()


@contextmanager
def served_side(serve: Callable[..., None], *arguments: Any) -> Iterator[Side]:
    """A side that lives in its own process as long as the context, and works when it is told to.

    Args:
        serve: called there with `arguments` and its end of a pipe. It sends "ready", then for each
            "go" the seconds of the work (float) or what it did instead (str); any other word ends
            it.
        arguments: can be pickled.

    Raises:
        RuntimeError: when the process ends early or does not answer, from the side also when it did
            something else.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(*arguments, theirs))
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe

    def answer() -> Any:
        if not ours.poll(ANSWER_SECONDS):
            raise RuntimeError(f"the other process did not answer within {ANSWER_SECONDS} s")
        try:
            return ours.recv()
        except EOFError as error:
            raise RuntimeError("the other process has ended, see its messages above") from error

    def side() -> float:
        ours.send("go")
        seconds = answer()
        if not isinstance(seconds, float):
            raise RuntimeError(f"{seconds}: it did not do the measured work")
        return seconds

    try:
        answer()
        yield side
        ours.send("end")
        process.join(30)
    finally:
        process.kill()
        process.join()


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """One other process that wants a core for itself, if `wanted`."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def linear_layers_side(policy: Policy, work: Workload) -> Callable[[], None]:
    """Only the language model's linear layers, on decoding's rows and steps: no engine takes less.

    They run as in the native engine's decode steps, by the product that its probe has chosen, each
    with weights of its own.
    """
    rows = work.prompts * work.group_size
    layers = [
        module
        for name, module in policy.model.named_modules()
        if type(module) is torch.nn.Linear and policy.family.part_of(f"{name}.weight") == "language_model"
    ]
    inputs = {layer.in_features: torch.randn(rows, layer.in_features) for layer in layers}

    @torch.inference_mode()
    def run() -> None:
        packs = PackedWeights()
        for _ in range(work.max_tokens - 1):  # the first token comes from the prompts' own pass
            with packs.active():
                for layer in layers:
                    layer(inputs[layer.in_features])

    return run


def summarise(timings: Mapping[str, Timing], tokens: int) -> dict[str, Any]:
    """Tokens a second of each side (by median), and the native engine's lead on the fastest other.

    `bound` is the lead that an engine would have that does nothing but the decode steps' linear
    layers.
    """
    best = min((name for name in timings if name not in OURS), key=lambda name: timings[name].median)
    return {
        "tokens_per_s": {name: round(tokens / one.median, 1) for name, one in timings.items()},
        "seconds": {name: one.summary() for name, one in timings.items()},
        "best_other": best,
        "ratio": round(timings[best].median / timings["native"].median, 3),
        "bound": round(timings[best].median / timings["linear_layers"].median, 3),
    }


def compare(folder: Path, work: Workload, label: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Tokens a second of each side in this process and its children; `label` says what else ran."""
    policy, renderer = load_policy(folder), make_renderer(folder)
    never_end(policy)
    images = policy.family.vision
    prompts = make_prompts(renderer, scratch, work, images=images)
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    pad = renderer.tokenizer.pad_token_id
    with ExitStack() as stack:
        sides: dict[str, Side] = {
            "native": timed(native_side(policy, prompts, renderer.decode, work.group_size, work.max_tokens)),
            "linear_layers": timed(linear_layers_side(policy, work)),
            "generate": timed(generate_side(model, prompts, pad, work.group_size, work.max_tokens, "dynamic")),
        }
        for name in arguments.vllm:
            engine = served_side(serve_vllm, folder, prompts, work, name == "eager", arguments.threads)
            sides[f"vllm_{name}"] = stack.enter_context(engine)
        timings = alternate(sides, rounds=arguments.rounds)
    found = summarise(timings, work.prompts * work.group_size * work.max_tokens)
    speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in found["tokens_per_s"].items())
    report(
        f"{work.prompts} prompts of {work.length} tokens, G = {work.group_size}, {label}: {speeds} tokens/s; "
        f"native / best other = {found['ratio']:.2f} (at most {found['bound']:.2f})"
    )
    return found


def measure(folder: Path, work: Workload, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Tokens a second of each side, alone and beside a process that was busy before them."""
    found: dict[str, Any] = dataclasses.asdict(work)
    # OpenMP reads how its threads shall wait when torch is loaded, so each has a process of its own
    context = multiprocessing.get_context("spawn")
    for label, busy in (("alone", False), ("beside_one_busy_process", True)):
        with busy_process(busy), ProcessPoolExecutor(1, context, initializer=start, initargs=(arguments,)) as process:
            found[label] = process.submit(compare, folder, work, label, arguments, scratch / label).result()
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
        del policy
        workloads = [
            Workload(length, size, arguments.completions // size, arguments.max_tokens)
            for length in arguments.lengths
            for size in arguments.group_sizes
        ]
        stem = f"rollout_vllm_{name.rpartition(':')[2]}"
        found: list[dict[str, Any]] = []
        for number, work in enumerate(workloads):
            found.append(measure(folder, work, arguments, Path(scratch) / str(number)))
            # after each workload, so that a sweep that is cut short leaves what it has measured
            result = {"rounds": arguments.rounds, "model": facts, "workloads": found}
            report(f"written to {write_result(stem, result, arguments.out)}")


if __name__ == "__main__":
    main()
