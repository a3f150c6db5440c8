"""How much memory and time do the learner's log-probabilities and gradients take, beside padding?

Three ways to the same numbers, each in a fresh process whose peak resident memory is compared with
what it held before:

    packed           rlmed: each prompt once before its completions, projection in chunks, logits never whole
    padded_chunked   a padded row per completion with its own copy of prompt and image, projection in chunks (as TRL 1.16 does)
    padded_full      the same with the logits of all completion tokens at once (as older trainers and plain scripts do)
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from benchmarks.common import (
    ROOT,
    Timing,
    add_arguments,
    alternate,
    find_model,
    make_renderer,
    model_facts,
    render_prompts,
    report,
    start,
    timed,
    write_examples,
    write_result,
)
from learner.packing import PackItem, TrainSequence, pack, packed_logprobs
from rlmed.core.types import Completion, Prompt
from rlmed.models.logprobs import chunked_logprobs
from rlmed.models.policy import load_policy

WAYS = ("packed", "padded_chunked", "padded_full")
TOLERANCE = 1e-4
TURN_TOKENS = 8
"""The last tokens of a prompt, which close the turn and open the answer."""
QUESTION_TOKENS = 12
"""The ones before them, which are text of the question."""

Compute = Callable[[], Tensor]
"""Run forward and backward; return the float32 [M] log-probabilities, completion by completion."""


def stretch(prompt: Prompt, length: int) -> Prompt:
    """The prompt with the text after its image repeated until it has `length` tokens.

    Raises:
        ValueError: when it is longer already.
    """
    missing = length - len(prompt.token_ids)
    if missing < 0:
        raise ValueError(f"a prompt has {len(prompt.token_ids)} tokens already: raise --prompt-lengths {length}")
    end = len(prompt.token_ids) - TURN_TOKENS
    filler = np.resize(prompt.token_ids[end - QUESTION_TOKENS : end], missing)
    token_ids = np.concatenate([prompt.token_ids[:end], filler, prompt.token_ids[end:]])
    return Prompt(prompt.example, prompt.text, token_ids, prompt.image_inputs)


def make_items(folder: Path, case: dict[str, int], scratch: Path) -> list[PackItem]:
    """Groups with random completions of full length; the same for every way."""
    examples = write_examples(scratch, case["prompts"])
    prompts = render_prompts(make_renderer(folder), examples)
    rng = np.random.default_rng(0)
    items = []
    for prompt in prompts:
        # ids of bytes: never a control token
        tokens = rng.integers(0, 250, (case["group_size"], case["max_tokens"]))
        blank = np.zeros(case["max_tokens"], dtype=np.float32)
        advantages = rng.standard_normal(case["group_size"])
        sequences = [
            TrainSequence(Completion(ids, blank, "", "length"), float(advantage))
            for ids, advantage in zip(tokens, advantages, strict=True)
        ]
        items.append(PackItem(stretch(prompt, case["prompt_length"]), tuple(sequences)))
    return items


def packed_way(folder: Path, items: list[PackItem]) -> tuple[Compute, torch.nn.Module]:
    """What `learner.PolicyLearner` does for a micro-batch, and the model that gets gradients."""
    policy = load_policy(folder)

    def compute() -> Tensor:
        batch = pack(items, policy)
        logprobs, _ = packed_logprobs(policy, batch, 1.0)
        (logprobs * batch.advantages[batch.sequence_ids]).mean().backward()
        return logprobs.detach()

    return compute, policy.model


def padded_way(folder: Path, items: list[PackItem], *, chunked: bool) -> tuple[Compute, torch.nn.Module]:
    """One row per completion; prompts have the same length here, so nothing is really padded."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    banned = torch.tensor(load_policy(folder).banned_token_ids)
    projection = model.get_output_embeddings()

    def compute() -> Tensor:
        sequences = [(item.prompt, entry) for item in items for entry in item.sequences]
        prompt_ids = torch.from_numpy(np.stack([prompt.token_ids for prompt, _ in sequences]))
        completion_ids = torch.from_numpy(np.stack([entry.completion.token_ids for _, entry in sequences]))
        ids = torch.cat([prompt_ids, completion_ids], dim=1)
        images = {
            name: torch.from_numpy(np.concatenate([prompt.image_inputs[name] for prompt, _ in sequences]))
            for name in sequences[0][0].image_inputs
        }
        hidden = model.base_model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).long(),
            use_cache=False,
            **images,
        ).last_hidden_state[:, prompt_ids.shape[1] - 1 : -1]
        if chunked:
            flat = hidden.reshape(-1, hidden.shape[-1])
            logprobs, _ = chunked_logprobs(
                flat, projection.weight, completion_ids.flatten(), temperature=1.0, banned=banned
            )
        else:
            logits = projection(hidden).index_fill_(2, banned, float("-inf"))
            chosen = logits.gather(2, completion_ids.unsqueeze(2)).squeeze(2)
            logprobs = (chosen - logits.logsumexp(dim=2)).flatten()
        advantages = torch.tensor([entry.advantage for _, entry in sequences])
        (logprobs.view(len(sequences), -1) * advantages.unsqueeze(1)).mean().backward()
        return logprobs.detach()

    return compute, model


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_child(way: str, folder: Path, case: dict[str, int], answer: Path, rounds: int) -> None:
    """Measure one way in this process and write peak, times and log-probabilities to `answer`."""
    items = make_items(folder, case, answer.parent / f"{answer.stem}_questions")
    if way == "packed":
        compute, model = packed_way(folder, items)
    else:
        compute, model = padded_way(folder, items, chunked=way == "padded_chunked")
    before = peak_bytes()
    logprobs = compute()
    gradient = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.stack([entry.norm() for entry in gradient]).norm())

    def again() -> None:
        model.zero_grad(set_to_none=True)
        compute()

    timing = alternate({way: timed(again)}, rounds=rounds, warmup=0, settle_s=0.0)[way]
    np.savez(answer, logprobs=logprobs.numpy(), norm=norm, peak=peak_bytes() - before, seconds=timing.seconds)


def run_case(folder: Path, case: dict[str, int], arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every way in a process of its own, and their agreement.

    Raises:
        SystemExit: when a process fails, or two ways do not agree.
    """
    found: dict[str, Any] = {}
    for way in WAYS:
        answer = scratch / f"{way}.npz"
        child = {"way": way, "folder": str(folder), "case": case, "answer": str(answer), "rounds": arguments.rounds}
        command = [sys.executable, "-m", "benchmarks.learner_memory", "--threads", str(arguments.threads), "--child"]
        done = subprocess.run([*command, json.dumps(child)], cwd=ROOT, check=False)
        if done.returncode:
            raise SystemExit(f"{way} with {case} ended with status {done.returncode}")
        with np.load(answer) as content:
            found[way] = {name: content[name] for name in content.files}
    return compare(case, found)


def compare(case: dict[str, int], found: dict[str, Any]) -> dict[str, Any]:
    """Memory and time of each way, and the largest log-probability difference from the packed way.

    Raises:
        SystemExit: when a difference is too large.
    """
    reference = found["packed"]
    result: dict[str, Any] = {**case}
    for way, values in found.items():
        difference = float(np.abs(values["logprobs"] - reference["logprobs"]).max())
        drift = abs(float(values["norm"]) / float(reference["norm"]) - 1)
        if not (difference <= TOLERANCE and drift <= TOLERANCE):
            raise SystemExit(
                f"{way} and packed differ by {difference:.2e} in log-probability, {drift:.2e} in gradient: {case}"
            )
        result[way] = {
            "peak_mib": round(float(values["peak"]) / 2**20, 1),
            **Timing(tuple(values["seconds"].tolist())).summary(),
            "max_logprob_difference": difference,
            "gradient_norm_difference": drift,
        }
    for way in WAYS[1:]:
        result[f"memory_ratio_{way}"] = round(result[way]["peak_mib"] / result["packed"]["peak_mib"], 2)
        result[f"time_ratio_{way}"] = round(result[way]["median_s"] / result["packed"]["median_s"], 2)
    return result


def main() -> None:
    """Measure every case and write `learner_memory.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, rounds=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    start(arguments)
    if arguments.child:
        child = json.loads(arguments.child)
        run_child(child["way"], Path(child["folder"]), child["case"], Path(child["answer"]), child["rounds"])
        return
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = find_model(arguments.model, Path(scratch))
        facts = model_facts(load_policy(folder), name)
        for prompt_length in arguments.prompt_lengths:
            for group_size in arguments.group_sizes:
                case = {
                    "prompts": arguments.prompts,
                    "group_size": group_size,
                    "prompt_length": prompt_length,
                    "max_tokens": arguments.max_tokens,
                }
                cases.append(run_case(folder, case, arguments, Path(scratch)))
                peaks = ", ".join(
                    f"{way} {cases[-1][way]['peak_mib']:.0f} MiB {cases[-1][way]['median_s']:.2f} s" for way in WAYS
                )
                report(f"prompt {prompt_length}, group size {group_size}: {peaks}")
    report(f"written to {write_result('learner_memory', {'model': facts, 'cases': cases}, arguments.out)}")


if __name__ == "__main__":
    main()
