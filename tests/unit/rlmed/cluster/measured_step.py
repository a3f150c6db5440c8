"""Measures the memory of a learner step, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.geometry_2b import forget_peak, memory
from learner.learner import PolicyLearner
from rlmed.cluster.memory import Batch, keep_freed_memory, learner_memory
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
from rlmed.models.policy import load_policy
from rlmed.models.size import ModelSize
from tests.configs import learner_config, loss_config


def groups_of(config: Any, batch: Batch) -> list[TrainGroup]:
    """Return random groups as long as the batch allows, with one image a prompt."""
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


def main(argument: str) -> None:
    """Print measured and estimated bytes of a learner step with the settings in `argument`."""
    given = json.loads(argument)
    batch, dtype = Batch(**given["batch"]), given["dtype"]
    config = learner_config(token_budget=batch.token_budget, **given["learner"])
    loss = loss_config(kl_coef=0.04 if given["reference"] else 0.0)
    load_policy(Path(given["tiny"]))  # the modules that loading imports
    keep_freed_memory()
    before = memory("VmRSS")
    policy = load_policy(Path(given["folder"]), dtype=dtype)
    reference = load_policy(Path(given["folder"]), dtype=dtype) if given["reference"] else None
    groups = groups_of(policy.model.config, batch)
    learner = PolicyLearner(
        policy, reference, loss, config, total_steps=9, max_tokens=batch.max_tokens, temperature=1.0
    )
    learner.step(groups[:1])  # the optimizer has its state from now on
    forget_peak()
    learner.step(groups)
    estimate = learner_memory(
        ModelSize.of(policy.model),
        config,
        batch,
        dtype=dtype,
        on_cpu=True,
        reference=reference is not None,
        checkpointing=bool(config.gradient_checkpointing),
    )
    sys.stdout.write(json.dumps({"peak": memory("VmHWM") - before, "estimate": estimate.peak}))
