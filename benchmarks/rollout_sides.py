"""What samples beside the native engine in rollout benchmarks: `generate` and vLLM."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.common import Side, render_prompts, sampling, write_examples
from benchmarks.learner_memory import QUESTION_TOKENS, TURN_TOKENS, stretch
from rlmed.core.types import Prompt, RolloutRequest
from rlmed.data.prompts import PromptRenderer
from rlmed.models.cpu.linear import PackedWeights
from rlmed.models.policy import Policy
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits

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


def padded_inputs(model: PreTrainedModel, prompts: Sequence[Prompt], pad: int) -> dict[str, Tensor]:
    """Forward arguments of left-padded prompts, as transformers' own processor makes them."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    attended = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        ids[row, longest - length :] = torch.as_tensor(prompt.token_ids)
        attended[row, longest - length :] = 1
    inputs = {"input_ids": ids, "attention_mask": attended}
    if prompts[0].image_inputs:
        names = prompts[0].image_inputs
        inputs |= {
            name: torch.from_numpy(np.concatenate([entry.image_inputs[name] for entry in prompts])) for name in names
        }
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    return inputs


def generate_side(
    model: PreTrainedModel, prompts: Sequence[Prompt], pad: int, group_size: int, max_tokens: int, cache: str
) -> Callable[[], Tensor]:
    """A call of `generate` that returns int64 [prompts * group_size, max_tokens]."""
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": max_tokens,
        "num_return_sequences": group_size,
        "pad_token_id": pad,
        "eos_token_id": None,
        "cache_implementation": cache,
    }
    # what a call leaves unset is taken from the model's own settings, the end token for one
    model.generation_config = GenerationConfig(pad_token_id=pad)
    config = GenerationConfig(**settings)
    inputs = padded_inputs(model, prompts, pad)
    length = inputs["input_ids"].shape[1]

    @torch.inference_mode()
    def run() -> Tensor:
        tokens = model.generate(**inputs, generation_config=config)[:, length:]
        if tokens.shape != (len(prompts) * group_size, max_tokens):
            raise RuntimeError(f"generate made {tuple(tokens.shape)} tokens: it did not do the measured work")
        return tokens

    return run


def native_side(
    policy: Policy, prompts: Sequence[Prompt], decode: Any, group_size: int, max_tokens: int
) -> Callable[[], None]:
    """A call of the native engine for the same work."""
    limits = EngineLimits(max_completions=len(prompts) * group_size)

    def run() -> None:
        engine = NativeEngine(policy, decode, limits)
        for index, prompt in enumerate(prompts):
            engine.submit(RolloutRequest(index, prompt, group_size, sampling(max_tokens, seed=index)))
        while engine.busy:
            engine.step()
        if engine.generated_tokens != len(prompts) * group_size * max_tokens:
            raise RuntimeError(f"the engine made {engine.generated_tokens} tokens: it did not do the measured work")

    return run


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
    """Only the language model's linear layers, on decoding's rows and steps, by torch's libraries.

    They run by the product that `model.onednn`'s probe has chosen, each with weights of its own.
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
