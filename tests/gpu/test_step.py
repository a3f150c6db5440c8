"""Decode steps as CUDA graphs, beside the same steps taken one operator at a time; skipped without
a CUDA device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlmed.core.types import Prompt, RolloutGroup, RolloutRequest, SamplingParams
from rlmed.models.policy import Policy, load_policy
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from rollout.native.slots import StepPlan
from tests.tiny_vision import TILE_FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", *TILE_FAMILIES, "qwen2", "qwen3", "llama", "gemma3_text")
LIMITS = EngineLimits(max_completions=24)


def requests(prompts: list[Prompt]) -> list[RolloutRequest]:
    settings = [{}, {"temperature": 0.7, "top_k": 9}, {"temperature": 0.0}, {"top_p": 0.8}]
    return [
        RolloutRequest(i, prompt, 1 + i % 5, SamplingParams(max_tokens=8 + 9 * i, seed=i, **settings[i % 4]))  # type: ignore[arg-type]
        for i, prompt in enumerate(prompts)
    ]


def finish(engine: NativeEngine, work: list[RolloutRequest]) -> list[RolloutGroup]:
    for request in work:
        engine.submit(request)
    groups = []
    while engine.busy:
        groups += engine.step()
    return sorted(groups, key=lambda group: group.request.index)


def tokens(groups: list[RolloutGroup]) -> list[list[int]]:
    return [completion.token_ids.tolist() for group in groups for completion in group.completions]


def load(family: str, dtype: str, tiny_folder: Callable[..., Path]) -> Policy:
    torch.backends.cuda.matmul.allow_tf32 = False
    return load_policy(tiny_folder(family), dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_sample_what_single_operators_do(
    family: str, dtype: str, tiny_folder: Callable[..., Path], mixed_prompts: Callable[..., list[Prompt]]
) -> None:
    policy = load(family, dtype, tiny_folder)
    plan = StepPlan.for_device(policy.device)
    assert plan.graphs
    work = requests(mixed_prompts(family, 10))
    graphs = NativeEngine(policy, lambda ids: "", LIMITS, plan)
    eager = NativeEngine(policy, lambda ids: "", LIMITS, dataclasses.replace(plan, graphs=False))
    expected = tokens(finish(eager, work))
    # shapes are captured in the first round and only replayed in the last
    for _ in range(3):
        assert tokens(finish(graphs, work)) == expected
    assert graphs._decoder is not None
    assert graphs._decoder._graphs is not None
    assert len(graphs._decoder._graphs._graphs) > 3


def test_graphs_see_new_weights_in_place_and_moved_ones(
    tiny_folder: Callable[..., Path], mixed_prompts: Callable[..., list[Prompt]]
) -> None:
    policy = load("qwen2_vl", "float32", tiny_folder)
    work = requests(mixed_prompts("qwen2_vl", 6))
    engine = NativeEngine(policy, lambda ids: "", LIMITS)
    plan = dataclasses.replace(StepPlan.for_device(policy.device), graphs=False)
    for move in (False, False, True):
        finish(engine, work)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                changed = parameter * 1.02
                if move:
                    parameter.data = changed
                else:
                    parameter.copy_(changed)
        engine.update_weights(engine.policy_version + 1)
        expected = finish(NativeEngine(policy, lambda ids: "", LIMITS, plan), work)
        assert tokens(finish(engine, work)) == tokens(expected)
