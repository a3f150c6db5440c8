"""Time and memory of the vocabulary projection's log-probabilities and gradients.

Beside torch's `log_softmax` of a linear layer with autograd, at the sizes of Qwen2-VL-2B's head and
of the tiny model's, and beside what arithmetic and memory allow on this machine: the products at
the speed of the fastest one measured, and each weight and gradient moved once in each pass at the
speed of a copy. Logits for sampling as well, which memory alone limits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from benchmarks.common import ROOT, Timing, add_arguments, alternate, report, start, timed, write_result
from benchmarks.learner_memory import peak_bytes
from rlmed.models.cpu.linear import matmul_transposed
from rlmed.models.cpu.products import Shape, probe_products, settle_products
from rlmed.models.logprobs import chunked_logprobs, masked_logits
from rlmed.models.policy import DTYPES

SIDES = ("rlmed", "torch")
QWEN = {"vocabulary": 151_936, "width": 1536}
TINY = {"vocabulary": 748, "width": 256}
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest difference of two log-probabilities; torch's logits are rounded to bfloat16."""


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes of a head and what is done with it."""

    name: str
    vocabulary: int
    width: int
    rows: int
    dtype: str
    learns: bool
    """Forward and backward of log-probabilities; else logits for sampling."""

    @property
    def product_flops(self) -> int:
        """Of one matrix product."""
        return 2 * self.rows * self.vocabulary * self.width

    @property
    def weight_bytes(self) -> int:
        """Of the projection, and of its gradient."""
        return self.vocabulary * self.width * DTYPES[self.dtype].itemsize

    def limit(self, gflops: float, gigabytes_per_s: float) -> dict[str, float]:
        """Seconds of three products (one to sample) and of moving weights and gradient."""
        products, moves = (3, 3) if self.learns else (1, 1)
        return {
            "arithmetic_s": products * self.product_flops / gflops / 1e9,
            "memory_s": moves * self.weight_bytes / gigabytes_per_s / 1e9,
        }


CASES = (
    Case("learn, Qwen2-VL-2B's head", rows=512, dtype="float32", learns=True, **QWEN),
    Case("learn, Qwen2-VL-2B's head", rows=512, dtype="bfloat16", learns=True, **QWEN),
    Case("sample, Qwen2-VL-2B's head", rows=16, dtype="float32", learns=False, **QWEN),
    Case("sample, Qwen2-VL-2B's head", rows=16, dtype="bfloat16", learns=False, **QWEN),
    Case("learn, the tiny model's head", rows=4096, dtype="float32", learns=True, **TINY),
    Case("sample, the tiny model's head", rows=64, dtype="float32", learns=False, **TINY),
)


def torch_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What a few lines of torch compute, without entropies."""
    return F.linear(hidden, weight).float().log_softmax(dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)


def make_side(case: Case, side: str) -> Callable[[], Tensor]:
    """Return the work of a side; it returns log-probabilities [M], or logits [M, V]."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.dtype]
    hidden = torch.empty(case.rows, case.width, dtype=dtype).normal_(generator=generator)
    weight = torch.empty(case.vocabulary, case.width, dtype=dtype).normal_(std=case.width**-0.5, generator=generator)
    targets = torch.randint(case.vocabulary, (case.rows,), generator=generator)
    advantages = torch.randn(case.rows, generator=generator)
    banned = torch.zeros(0, dtype=torch.int64)

    @torch.inference_mode()
    def sample() -> Tensor:
        return masked_logits(hidden, weight, banned) if side == "rlmed" else F.linear(hidden, weight).float()

    def learn() -> Tensor:
        hidden.grad = weight.grad = None
        if side == "rlmed":
            logprobs, _ = chunked_logprobs(hidden, weight, targets, temperature=1.0, banned=banned)
        else:
            logprobs = torch_logprobs(hidden, weight, targets)
        (logprobs * advantages).mean().backward()
        return logprobs.detach()

    if not case.learns:
        return sample
    hidden.requires_grad_()
    weight.requires_grad_()
    return learn


def ceilings() -> tuple[float, float]:
    """Return this process's fastest float32 product in GFLOP/s, and a copy in GB/s."""
    with torch.inference_mode():
        x, weight, many = torch.ones(512, 1536), torch.ones(4096, 1536), torch.ones(2**26)
        other = torch.empty_like(many)
        product = min(timed(lambda: matmul_transposed(x, weight))() for _ in range(10))
        copy = min(timed(lambda: other.copy_(many))() for _ in range(5))
    return 2 * 512 * 4096 * 1536 / product / 1e9, 2 * many.nbytes / copy / 1e9


def run_times(case: Case, rounds: int) -> dict[str, Any]:
    """Time both sides in turn.

    Raises:
        SystemExit: when they do not agree.
    """
    onednn = settle_products(PreTrainedConfig(), probe_products([Shape(case.vocabulary, case.width)]))
    work = {side: make_side(case, side) for side in SIDES}
    one, other = (work[side]() for side in SIDES)
    difference = float((one - other).abs().max())
    if not difference <= TOLERANCE[case.dtype]:
        raise SystemExit(f"{case}: the sides differ by {difference:.2e}")
    del one, other
    timings = alternate({side: timed(run) for side, run in work.items()}, rounds=rounds, warmup=0)
    gflops, bandwidth = ceilings()
    limit = case.limit(gflops, bandwidth)
    return {
        "onednn": list(onednn),
        "float32_gflops": round(gflops, 1),
        "copy_gb_per_s": round(bandwidth, 1),
        "limit": {name: round(seconds, 5) for name, seconds in limit.items()},
        "share_of_limit": round(max(limit.values()) / timings["rlmed"].median, 3),
        "max_difference": difference,
        "seconds": {side: list(timing.seconds) for side, timing in timings.items()},
    }


def run_memory(case: Case, side: str, onednn: Sequence[str]) -> dict[str, Any]:
    """Return the bytes by which a side's first run raises the process's peak."""
    settle_products(PreTrainedConfig(), onednn)
    run = make_side(case, side)
    before = peak_bytes()
    run()
    return {"peak": peak_bytes() - before}


def run_child(task: dict[str, Any], threads: int, answer: Path) -> dict[str, Any]:
    """Run a task in a fresh process and return its answer.

    Raises:
        SystemExit: when the process fails.
    """
    content = json.dumps({**task, "answer": str(answer)})
    command = [sys.executable, "-m", "benchmarks.head", "--threads", str(threads), "--child", content]
    if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit(f"{task} ended with status {status}")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def run_case(case: Case, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure times in one process, and the memory of each side in another."""
    answer = scratch / "answer.json"
    found = run_child({"case": asdict(case), "rounds": arguments.rounds}, arguments.threads, answer)
    result = {**asdict(case), **found}
    for side in SIDES:
        task = {"case": asdict(case), "side": side, "onednn": found["onednn"]}
        peak = run_child(task, arguments.threads, answer)["peak"]
        result[side] = {"peak_mib": round(peak / 2**20, 1), **Timing(tuple(found["seconds"][side])).summary()}
    del result["seconds"]
    result["time_ratio"] = round(result["torch"]["median_s"] / result["rlmed"]["median_s"], 2)
    return result


def main() -> None:
    """Measure every case and write `head.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, rounds=3, model=False)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    start(arguments)
    if arguments.child:
        task = json.loads(arguments.child)
        case = Case(**task["case"])
        memory = "side" in task
        found = run_memory(case, task["side"], task["onednn"]) if memory else run_times(case, task["rounds"])
        Path(task["answer"]).write_text(json.dumps(found), encoding="utf-8")
        return
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            results.append(run_case(case, arguments, Path(scratch)))
            sides = ", ".join(
                f"{side} {results[-1][side]['median_s']:.4f} s {results[-1][side]['peak_mib']:.0f} MiB"
                for side in SIDES
            )
            report(
                f"{case.name}, {case.rows} rows, {case.dtype}: {sides}; {results[-1]['share_of_limit']:.0%} of the limit"
            )
    report(f"written to {write_result('head', {'cases': results}, arguments.out)}")


if __name__ == "__main__":
    main()
