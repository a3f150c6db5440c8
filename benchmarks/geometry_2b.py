"""Do engine and learner agree at Qwen2-VL-2B's size on this CPU, in the memory that is estimated?

Random weights: one prompt with an image is prefilled, a group takes ten decoding steps, and the
learner computes the log-probabilities of what was sampled, with all that its backward pass needs.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, model_facts, never_end, report, sampling, start, write_result
from benchmarks.gpu.setting import GEOMETRIES, make_prompts, model_folder_of
from learner.packing import PackedBatch, PackItem, TrainSequence, pack, packed_logprobs
from rlmed.cluster.memory import (
    PROCESS_BYTES,
    Batch,
    MemoryEstimate,
    Sampling,
    engine_memory,
    keep_freed_memory,
    learner_memory,
)
from rlmed.core.config.composing import compose_config
from rlmed.core.process.threads import usable_cores
from rlmed.core.types import Prompt, RolloutGroup, RolloutRequest
from rlmed.models.policy import DTYPES, Policy, load_policy
from rlmed.models.size import ModelSize
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits

ROUNDINGS = 14
"""Of a number on its way through a decoder layer: norms, products, rotation, activation, sums."""
ENDS = 6
"""Of a log-probability in float32, by two ways: logit, sum of exponentials, their difference."""
DEVIATIONS = 4.5
"""Largest of 10,000 normal numbers, in standard deviations."""


def memory(name: str) -> int:
    """Return this process's memory in bytes: VmRSS now, or VmHWM, the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    """Start to measure the peak from what is there now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def rounding_bound(policy: Policy, spread: float, largest: float) -> float:
    """Return how far apart rounding brings two log-probabilities of the same token.

    Each rounding is off by at most eps / 2 of its number, evenly distributed: eps / √12 on average.
    Those of all layers add like a random walk, and reach the logits in proportion to their spread.
    Two ways of computing are off independently (√2). The log-probability itself, of at most
    `largest`, is float32 in every policy.
    """
    walk = math.sqrt(ROUNDINGS * policy.kv_shape[0])
    own = DEVIATIONS * math.sqrt(2) * walk * torch.finfo(policy.dtype).eps / math.sqrt(12) * spread
    return own + ENDS * torch.finfo(torch.float32).eps / 2 * largest


def sample(
    policy: Policy, prompt: Prompt, group_size: int, steps: int
) -> tuple[RolloutGroup, dict[str, float], NativeEngine]:
    """Prefill a group's prompt and take `steps` decoding steps; also return seconds and engine."""
    limits = EngineLimits(
        max_completions=group_size, max_prompt_tokens=len(prompt.token_ids), prefill_tokens=len(prompt.token_ids)
    )
    engine = NativeEngine(policy, lambda _: "", limits)
    # prefill gives the first token
    engine.submit(RolloutRequest(0, prompt, group_size, sampling(steps + 1)))
    begun = time.perf_counter()
    done = engine.step()
    prefilled = time.perf_counter()
    while engine.busy:
        done += engine.step()
    seconds = {"prefill_s": prefilled - begun, "decode_step_s": (time.perf_counter() - prefilled) / steps}
    return done[0], seconds, engine


@torch.no_grad()
def plain_logprobs(policy: Policy, prompt: Prompt, completion: Tensor) -> Tensor:
    """Compute a completion's log-probabilities by transformers' own attention, without rlmed's."""
    settings = policy.model.config.get_text_config()
    ours, settings._attn_implementation = settings._attn_implementation, "sdpa"
    try:
        ids = torch.cat([torch.as_tensor(prompt.token_ids), completion[:-1]]).unsqueeze(0)
        positions = policy.prompt_positions(prompt)
        following = positions.max() + 1 + torch.arange(len(completion) - 1)
        positions = torch.cat([positions, following.expand(len(positions), -1)], dim=1)
        states = policy.model.base_model(
            input_ids=ids, position_ids=positions.unsqueeze(1), use_cache=False, **policy.image_inputs(prompt)
        ).last_hidden_state[0]
    finally:
        settings._attn_implementation = ours
    return policy.logprobs_no_grad(states[len(prompt.token_ids) - 1 :], completion)


def estimated(policy: Policy, batch: Batch) -> MemoryEstimate:
    """Return the estimate of sampling and a learner's forward pass: nothing that training adds."""
    size, dtype = ModelSize.of(policy.model), str(policy.dtype).removeprefix("torch.")
    settings = compose_config("train", []).learner
    learner = learner_memory(size, settings, batch, dtype=dtype, on_cpu=True, reference=False, checkpointing=False)
    tokens = batch.prompt_tokens + batch.group_size * batch.max_tokens
    engine = engine_memory(size, Sampling(batch.group_size, tokens, batch.prompt_tokens, filtered=False), dtype=dtype)
    return MemoryEstimate(
        weights=learner.weights,
        kv_cache=engine.kv_cache,
        activations=learner.activations,
        logits=learner.logits,
        passing=max(engine.passing, learner.activations + learner.logits),
    )


def row_of(prompt: Prompt, group: RolloutGroup, policy: Policy) -> PackedBatch:
    """Return the learner's row of the group."""
    sequences = tuple(TrainSequence(completion, 1.0) for completion in group.completions)
    return pack([PackItem(prompt, sequences)], policy)


def measure(folder: Path, dtype: str, group_size: int, steps: int, visual_tokens: int, length: int) -> dict[str, Any]:
    """Compare engine, learner and transformers, and the memory with its estimate."""
    prompts, _ = make_prompts(folder, 1, length, folder.parent)
    keep_freed_memory()
    before = memory("VmRSS")
    forget_peak()
    policy = load_policy(folder, dtype=dtype)
    never_end(policy)
    group, seconds, engine = sample(policy, prompts[0], group_size, steps)
    row = row_of(prompts[0], group, policy)
    begun = time.perf_counter()
    learnt, _ = packed_logprobs(policy, row, 1.0)
    seconds["learner_forward_s"] = time.perf_counter() - begun
    peak = memory("VmHWM") - before
    learnt = learnt.detach()
    del engine
    first = torch.as_tensor(group.completions[0].token_ids)
    plain = plain_logprobs(policy, prompts[0], first)
    with torch.no_grad():
        hidden = policy.hidden(row.token_ids, row.positions, row.layout, row.image_inputs)[row.predictors[:1]]
        logits = policy.logits(hidden)
        spread = float(logits[logits.isfinite()].std())
    batch = Batch(1, group_size, len(prompts[0].token_ids), visual_tokens, steps + 1, 2**20)
    estimate = estimated(policy, batch)
    gib = {name: round(size / 2**30, 3) for name, size in estimate.parts().items() if size}
    return {
        "model": model_facts(policy, "random weights"),
        "setting": {"prompt_tokens": batch.prompt_tokens, "group_size": group_size, "decode_steps": steps},
        "logprobs": {
            "tokens": len(learnt),
            "engine_learner_max": float((row.rollout_logprobs - learnt).abs().max()),
            "engine_learner_mean": float((row.rollout_logprobs - learnt).abs().mean()),
            "transformers_learner_max": float((plain - learnt[: len(first)]).abs().max()),
            "bound": rounding_bound(policy, spread, float(learnt.abs().max())),
            "logits_std": spread,
        },
        "memory_gib": {
            "peak": round(peak / 2**30, 3),
            "estimate": round((estimate.peak + PROCESS_BYTES) / 2**30, 3),
            "estimate_to_peak": round((estimate.peak + PROCESS_BYTES) / peak, 3),
            "terms": gib,
        },
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Build the model, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="2b")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="decoding steps")
    parser.add_argument("--visual-tokens", type=int, default=512, help="of the prompt's image")
    parser.add_argument("--prompt-tokens", type=int, default=640, help="length of the prompt")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="torch threads (default: all usable cores)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result (default benchmarks/results)")
    arguments = parser.parse_args(given)
    start(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        # scores near zero: a common score of 120 makes each rounding of queries and keys count
        # forty times as much, on both sides
        making = (arguments.geometry, folder, torch.device("cpu"), arguments.visual_tokens, 0.0)
        # in a process of its own, whose memory is not measured
        maker = multiprocessing.get_context("spawn").Process(target=model_folder_of, args=making)
        maker.start()
        maker.join()
        visual = math.ceil(math.sqrt(arguments.visual_tokens)) ** 2
        result = measure(
            folder, arguments.dtype, arguments.group_size, arguments.steps, visual, arguments.prompt_tokens
        )
    logprobs, found = result["logprobs"], result["memory_gib"]
    report(
        f"|engine - learner| {logprobs['engine_learner_max']:.3g} at most, bound {logprobs['bound']:.3g}; "
        f"|transformers - learner| {logprobs['transformers_learner_max']:.3g}"
    )
    report(f"peak {found['peak']} GiB, estimate {found['estimate']} ({found['estimate_to_peak']} of it)")
    report(", ".join(f"{name} {value}" for name, value in result["seconds"].items()))
    write_result(f"geometry_{arguments.geometry}_{arguments.dtype}", result, arguments.out)
    return result


if __name__ == "__main__":
    main()
