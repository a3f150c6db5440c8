"""How many tokens a second does the native engine sample, beside transformers `generate`?

8 prompts x 8 completions x 64 tokens, sampled at temperature 1; the end token ends nothing on
either side. `generate` runs with each cache it offers, and the fastest of them is what the engine
is compared with. It need not return log-probabilities and may sample vision tokens; the engine
returns the one and bans the other.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

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
    spread,
    start,
    timed,
    write_examples,
    write_result,
)
from rlmed.core.types import Prompt, RolloutRequest
from rlmed.models.policy import Policy, load_policy
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits

CACHES = ("dynamic", "static")


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


def measure(folder: Path, name: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both workloads: prompts with their images, and the same prompts as text."""
    policy = load_policy(folder)
    never_end(policy)
    facts = model_facts(policy, name)
    renderer = make_renderer(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    examples = write_examples(scratch / "questions", arguments.prompts)
    tokens = arguments.prompts * arguments.group_size * arguments.max_tokens
    work = (arguments.group_size, arguments.max_tokens)
    pad = renderer.tokenizer.pad_token_id
    workloads = {}
    for label, images in (("image", True), ("text", False)):
        prompts = render_prompts(renderer, examples, images=images)
        sides: dict[str, Side] = {"native": timed(native_side(policy, prompts, renderer.decode, *work))}
        for cache in CACHES:
            sides[f"generate_{cache}"] = timed(generate_side(model, prompts, pad, *work, cache))
        timings = alternate(sides, rounds=arguments.rounds)
        workloads[label] = summarise(timings, tokens, [len(prompt.token_ids) for prompt in prompts])
        line = ", ".join(
            f"{side} {entry['tokens_per_s']:.0f} tokens/s" for side, entry in workloads[label]["sides"].items()
        )
        report(f"{label}: {line}; native / best generate = {workloads[label]['ratio']:.2f}")
    return {"model": facts, "workloads": workloads}


def summarise(timings: dict[str, Timing], tokens: int, prompt_lengths: Sequence[int]) -> dict[str, Any]:
    """Tokens a second of each side (by median), and the engine's lead on the best `generate`."""
    best = min((name for name in timings if name != "native"), key=lambda name: timings[name].median)
    return {
        "prompt_tokens": spread(prompt_lengths),
        "sides": {
            name: {"tokens_per_s": round(tokens / one.median, 1), **one.summary()} for name, one in timings.items()
        },
        "best_generate": best,
        "ratio": round(timings[best].median / timings["native"].median, 3),
    }


def main() -> None:
    """Measure and write `rollout_speed.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, rounds=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    start(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = find_model(arguments.model, Path(scratch))
        measured = measure(folder, name, arguments, Path(scratch))
    setting = {
        key: value for key, value in vars(arguments).items() if key in ("prompts", "group_size", "max_tokens", "rounds")
    }
    report(f"written to {write_result('rollout_speed', {'setting': setting, **measured}, arguments.out)}")


if __name__ == "__main__":
    main()
