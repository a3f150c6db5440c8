"""The learner's forward and backward pass, with and without padding and checkpointing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.probe import matmul_tflops
from benchmarks.gpu.setting import PeakMemory, device_of, lines, make_prompts, model_folder_of, rounded, seconds
from learner.packing import PackItem, TrainSequence, pack, packed_logprobs
from rlmed.core.types import Completion, Prompt
from rlmed.models import policy as policies
from rlmed.models.policy import Policy, load_policy
from rlmed.models.varlen import AttentionChoice, choose_attention

ATTENTION = ("padded", "chosen")


def make_items(prompts: list[Prompt], group_size: int, longest: int) -> list[PackItem]:
    """Return groups of completions of random tokens, half as long as the longest to as long."""
    rng = np.random.default_rng(0)
    items = []
    for prompt in prompts:
        sequences = []
        for length in rng.integers(longest // 2, longest + 1, group_size):
            ids = rng.integers(0, 250, length)
            completion = Completion(ids, np.zeros(length, np.float32), "", "length")
            sequences.append(TrainSequence(completion, float(rng.standard_normal())))
        items.append(PackItem(prompt, tuple(sequences)))
    return items


def one_pass(policy: Policy, items: list[PackItem]) -> None:
    """Compute the log-probabilities of a micro-batch and the gradients of a loss on them."""
    policy.model.zero_grad(set_to_none=True)
    batch = pack(items, policy)
    logprobs, _ = packed_logprobs(policy, batch, 1.0)
    (logprobs * batch.advantages[batch.sequence_ids]).mean().backward()


def flops(policy: Policy, items: list[PackItem], *, vision: bool) -> float:
    """Return the useful operations of a pass: 6 a parameter and token (arXiv 2001.08361).

    Completion tokens alone go through the vocabulary projection; a patch goes through the vision
    tower once, and the weights of its gradients are counted.
    """
    language = vision_weights = 0
    embedding = policy.model.get_input_embeddings().weight
    for name, parameter in policy.model.named_parameters():
        if ".visual." in f".{name}":
            vision_weights += parameter.numel()
        elif parameter is not embedding and parameter is not policy.projection.weight:
            language += parameter.numel()
    tokens = sum(item.tokens for item in items)
    completion = sum(len(entry.completion.token_ids) for item in items for entry in item.sequences)
    patches = sum(len(item.prompt.image_inputs.get("pixel_values", ())) for item in items) if vision else 0
    return 6.0 * (language * tokens + policy.projection.weight.numel() * completion + vision_weights * patches)


def run(arguments: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], list[str]]:
    """Measure; return the results and the lines of a short table."""
    device, smoke = device_of(arguments), arguments.smoke
    folder = model_folder_of(arguments.model, scratch / arguments.model, device, 16 if smoke else 512)
    policy = load_policy(folder, dtype="float32" if smoke else "bfloat16", device=device)
    prompts, _ = make_prompts(folder, 2 if smoke else 4, 80 if smoke else 640, scratch)
    items = make_items(prompts, 4 if smoke else 8, 8 if smoke else 256)
    useful = flops(policy, items, vision=True)
    ceiling = matmul_tflops(device, 256 if smoke else 8192, policy.dtype) * 1e12
    choice = choose_attention(device, policy.dtype, policy.kv_shape[2])
    rows = []
    for attention in ATTENTION:
        policies.choose_attention = (  # type: ignore[assignment]
            (lambda *_: AttentionChoice(None, "measured")) if attention == "padded" else choose_attention
        )
        for checkpointing in (False, True):
            if checkpointing:
                policy.model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                policy.model.gradient_checkpointing_disable()
            policy.model.train(checkpointing)
            peak = PeakMemory(device)
            peak.start()
            taken = seconds(lambda: one_pass(policy, items), device, rounds=1 if smoke else 3, warmup=1)
            rows.append(
                rounded(
                    {
                        "attention": attention,
                        "checkpointing": checkpointing,
                        "seconds": taken,
                        "tokens_per_s": sum(item.tokens for item in items) / taken,
                        "tflops": useful / taken / 1e12,
                        "share_of_matmul": useful / taken / ceiling,
                        "peak_gib": peak.gib(),
                    }
                )
            )
    policies.choose_attention = choose_attention
    results = {"model": arguments.model, "attention": str(choice), "learner": rows}
    return results, [f"chosen attention: {choice}", *lines(rows, list(rows[0]))]
