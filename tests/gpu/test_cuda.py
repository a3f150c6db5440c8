"""The parity ladder on a CUDA device; skipped without one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.learner import PolicyLearner
from learner.packing import PackItem, TrainSequence, pack, packed_logprobs
from rlmed.core.types import Prompt, RolloutGroup, RolloutRequest, SamplingParams, ScoredGroup, TrainGroup
from rlmed.models.policy import Policy, load_policy
from rollout.native.engine import NativeEngine
from tests.configs import learner_config, loss_config
from tests.tiny_vision import TILE_FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", *TILE_FAMILIES, "qwen2", "gemma3_text")


def sample(policy: Policy, prompts: list[Prompt], group_size: int) -> list[RolloutGroup]:
    engine = NativeEngine(policy, lambda ids: " ".join(map(str, ids)))
    for index, prompt in enumerate(prompts):
        engine.submit(RolloutRequest(index, prompt, group_size, SamplingParams(max_tokens=24, seed=index)))
    groups = []
    while engine.busy:
        groups += engine.step()
    return sorted(groups, key=lambda group: group.request.index)


def learner_logprobs(policy: Policy, groups: list[RolloutGroup]) -> torch.Tensor:
    items = [
        PackItem(group.prompt, tuple(TrainSequence(entry, 1.0) for entry in group.completions)) for group in groups
    ]
    with torch.no_grad():
        return packed_logprobs(policy, pack(items, policy), 1.0)[0].cpu()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.25)])
def test_engine_and_learner_agree(
    family: str,
    dtype: str,
    tolerance: float,
    tiny_folder: Callable[..., Path],
    mixed_prompts: Callable[..., list[Prompt]],
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    policy = load_policy(tiny_folder(family), dtype=dtype, device="cuda")
    groups = sample(policy, mixed_prompts(family, 8), group_size=4)
    sampled = np.concatenate([entry.rollout_logprobs for group in groups for entry in group.completions])
    difference = (learner_logprobs(policy, groups) - torch.from_numpy(sampled)).abs()
    assert float(difference.mean()) < tolerance / 10
    assert float(difference.max()) < tolerance


def test_the_gpu_computes_what_the_cpu_does(
    tiny_folder: Callable[..., Path], mixed_prompts: Callable[..., list[Prompt]]
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    on_cpu, on_gpu = (load_policy(tiny_folder("qwen2_vl"), device=device) for device in ("cpu", "cuda"))
    groups = sample(on_gpu, mixed_prompts("qwen2_vl", 6), group_size=4)
    torch.testing.assert_close(learner_logprobs(on_cpu, groups), learner_logprobs(on_gpu, groups), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_arrives_whole_on_the_gpu(tiny_folder: Callable[..., Path], dtype: str) -> None:
    here, there = (load_policy(tiny_folder("qwen2_vl"), dtype=dtype, device=device).model for device in ("cpu", "cuda"))
    tensors = {**dict(there.named_parameters()), **dict(there.named_buffers())}
    for name, value in (*here.named_parameters(), *here.named_buffers()):
        assert tensors[name].device.type == "cuda", name
        assert torch.equal(tensors[name].cpu(), value), name


def test_a_bfloat16_step_moves_every_master_weight(
    tiny_folder: Callable[..., Path], mixed_prompts: Callable[..., list[Prompt]]
) -> None:
    policy = load_policy(tiny_folder("qwen2_vl"), dtype="bfloat16", device="cuda")
    learner = PolicyLearner(
        policy, None, loss_config(kl_coef=0.0), learner_config(lr=1e-6), total_steps=10, max_tokens=24, temperature=1.0
    )
    before = {name: tensor.clone() for name, tensor in learner.optimizer.state_dict()["masters"].items()}  # type: ignore[attr-defined]
    groups = sample(policy, mixed_prompts("qwen2_vl", 4), group_size=4)
    rewards = np.arange(4, dtype=np.float32)
    metrics = learner.step([TrainGroup(ScoredGroup(group, rewards, {}), rewards - 1.5) for group in groups])
    assert metrics["skipped_steps"] == 0
    after = learner.optimizer.state_dict()["masters"]
    assert [name for name, tensor in before.items() if tensor.equal(after[name])] == []  # type: ignore[index]


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_checkpoint_is_resumed_bit_for_bit(
    moments: str, tmp_path: Path, tiny_folder: Callable[..., Path], make_train_groups: Callable[..., list[TrainGroup]]
) -> None:
    """Written from the host's copies, while the learner goes on."""

    def learner(folder: Path) -> PolicyLearner:
        policy = load_policy(folder, dtype="bfloat16", device="cuda")
        settings = learner_config(lr=1e-3, moments=moments)
        loss = loss_config(kl_coef=0.0)
        return PolicyLearner(policy, None, loss, settings, total_steps=10, max_tokens=32, temperature=1.0)

    trained, groups = learner(tiny_folder("qwen2_vl")), make_train_groups("qwen2_vl", 2)
    trained.step(groups)
    expected = {name: weight.detach().clone() for name, weight in trained.policy.model.named_parameters()}
    state = copy.deepcopy(trained.optimizer.state_dict())
    write = trained.save(tmp_path)
    trained.step(groups)
    write()
    resumed = learner(tmp_path)
    resumed.load(tmp_path)
    for name, weight in resumed.policy.model.named_parameters():
        assert torch.equal(weight, expected[name]), name
    got = resumed.optimizer.state_dict()
    assert all(torch.equal(got["masters"][name], master) for name, master in state["masters"].items())
    for number, entry in state["adamw"]["state"].items():
        for key, value in entry.items():
            assert torch.equal(got["adamw"]["state"][number][key].cpu(), value.cpu()), (number, key)
