"""How much memory does a learner step take, with adapters and without, and what was estimated?

Each step is taken in a fresh process. What counts is its most resident memory less what was
resident before the model was loaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, ROOT, model_facts, report, start, write_result
from benchmarks.geometry_2b import forget_peak, memory
from learner.learner import PolicyLearner
from rlmed.cluster.memory import PROCESS_BYTES, Batch, keep_freed_memory, learner_memory, merged_weights
from rlmed.core.config.composing import compose_config
from rlmed.core.process.threads import usable_cores
from rlmed.core.types import (
    Completion,
    Example,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    TrainGroup,
)
from rlmed.models.adapters import add_adapters
from rlmed.models.loading import model_folder
from rlmed.models.policy import load_policy
from rlmed.models.size import ModelSize

MIB = 2**20
ROWS = {
    "short": Batch(groups=3, group_size=4, prompt_tokens=40, visual_tokens=0, max_tokens=24, token_budget=16384),
    "long": Batch(groups=3, group_size=4, prompt_tokens=400, visual_tokens=0, max_tokens=128, token_budget=1000),
}
"""One micro-batch of 396 tokens, and three of 908."""
WAYS = {"all weights": None, "rank 8": 8, "rank 64": 64}


def groups_of(config: Any, batch: Batch) -> list[TrainGroup]:
    """Random groups as long as the batch allows, with one image a prompt."""
    rng, groups = np.random.default_rng(0), []
    side = round((batch.visual_tokens * 4) ** 0.5)
    for index in range(batch.groups):
        ids = rng.integers(20, 300, batch.prompt_tokens)
        inputs: dict[str, Any] = {}
        if batch.visual_tokens:
            ids[4] = config.vision_start_token_id
            ids[5 : 5 + batch.visual_tokens] = config.image_token_id
            ids[5 + batch.visual_tokens] = config.vision_end_token_id
            inputs = {
                "pixel_values": rng.standard_normal((side * side, 1176)).astype(np.float32),
                "image_grid_thw": np.array([[1, side, side]]),
            }
        prompt = Prompt(Example(f"p{index}", None, "?", ("a", "b"), 0), "", ids, inputs)
        completions = tuple(
            Completion(
                rng.integers(20, 300, batch.max_tokens), -np.ones(batch.max_tokens, dtype=np.float32), "", "length"
            )
            for _ in range(batch.group_size)
        )
        rollout = RolloutGroup(RolloutRequest(index, prompt, batch.group_size, SamplingParams()), completions)
        advantages = rng.standard_normal(batch.group_size).astype(np.float32)
        groups.append(TrainGroup(ScoredGroup(rollout, advantages, {}), advantages))
    return groups


def measure(folder: Path, batch: Batch, overrides: list[str], dtype: str = "float32") -> dict[str, int]:
    """Take two steps in this process; return bytes, those of the second at most and the estimate.

    With adapters there are also the merged weights that an engine beside the learner samples with.
    """
    config = compose_config("train", [*overrides, f"learner.token_budget={batch.token_budget}"])
    lora, loss = config.learner.lora, config.algo.loss
    small = load_policy(model_folder("embedded:tiny_base"))  # imports the modules that loading needs
    if lora.rank is not None:
        add_adapters(small, lora, base="", seed=0)
    keep_freed_memory()
    before = memory("VmRSS")
    policy, reference = load_policy(folder, dtype=dtype), None
    size = ModelSize.of(policy.model)
    if lora.rank is not None:
        sampling, policy = policy, add_adapters(policy, lora, base="", seed=0)
        assert policy.adapters is not None
        policy.adapters.give_to(sampling)
    elif loss.kl_coef:
        reference = load_policy(folder, dtype=dtype)
    groups = groups_of(policy.model.config, batch)
    learner = PolicyLearner(
        policy, reference, loss, config.learner, total_steps=9, max_tokens=batch.max_tokens, temperature=1.0
    )
    learner.step(groups[:1])  # the optimizer has its state from now on
    forget_peak()
    learner.step(groups)
    peak = memory("VmHWM") - before
    estimate = learner_memory(
        size,
        config.learner,
        batch,
        dtype=dtype,
        on_cpu=True,
        reference=loss.kl_coef > 0,
        checkpointing=bool(config.learner.gradient_checkpointing),
    )
    estimated = estimate.peak + merged_weights(size, config.learner, dtype=dtype) + PROCESS_BYTES
    return {"peak": peak, "estimate": estimated}


def run_child(argument: str) -> None:
    """Print what `measure` returns for the settings in `argument`, JSON."""
    given = json.loads(argument)
    found = measure(Path(given["folder"]), Batch(**given["batch"]), given["overrides"], given.get("dtype", "float32"))
    sys.stdout.write(json.dumps(found) + "\n")


def measured(folder: Path, batch: Batch, overrides: list[str], threads: int) -> dict[str, int]:
    """What `measure` returns in a process of its own.

    Raises:
        SystemExit: when it fails.
    """
    given = {
        "folder": str(folder),
        "batch": {name: getattr(batch, name) for name in Batch.__slots__},
        "overrides": overrides,
    }
    command = [sys.executable, "-m", "benchmarks.step_memory", "--threads", str(threads), "--child", json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{overrides} with {batch} ended with status {done.returncode}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every case and write `step_memory.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="embedded:tiny_base", help="model folder (default: the tiny base)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="torch threads (default: all cores)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result (default benchmarks/results)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    start(arguments)
    if arguments.child:
        run_child(arguments.child)
        return
    folder, cases = model_folder(arguments.model), []
    for (rows, batch), recomputed, (way, rank) in itertools.product(ROWS.items(), (False, True), WAYS.items()):
        overrides = [f"learner.gradient_checkpointing={str(recomputed).lower()}"]
        if rank is not None:
            overrides += ["learner=lora", f"learner.lora.rank={rank}"]
        found = measured(folder, batch, overrides, arguments.threads)
        case = {"trained": way, "rows": rows, "tokens": batch.tokens, "gradient_checkpointing": recomputed}
        case |= {f"{name}_mib": round(found[name] / MIB) for name in ("peak", "estimate")}
        case["peak_by_estimate"] = round(found["peak"] / found["estimate"], 3)
        cases.append(case)
        report(", ".join(f"{name} {value}" for name, value in case.items()))
    facts = model_facts(load_policy(folder), arguments.model.rpartition("/")[2])
    report(f"written to {write_result('step_memory', {'model': facts, 'cases': cases}, arguments.out)}")


if __name__ == "__main__":
    main()
