"""Flash attention's kernels on a CUDA device against the float64 reference; else skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learner.packing import PackItem, TrainSequence, pack, packed_logprobs
from rlmed.core.types import Prompt, TrainGroup
from rlmed.models.attention import PackedLayout
from rlmed.models.policy import load_policy, merge_image_inputs
from rlmed.models.varlen import VarlenLayout, choose_attention
from rlmed.models.varlen_backends import Backend, FlashAttn, Reference, TorchFlash
from rlmed.models.vision import VISION_ATTENTION_NAME
from tests.dense_attention import Groups, row_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GROUPS: tuple[Groups, ...] = (
    [(3, (4, 1, 2)), (1, ()), (6, (0, 5)), (2, (0,)), (4, (3,))],
    [(130, (70, 9, 140, 1))],
    [(1, (1, 1))],
    [(5, ()), (257, ())],
    [(800, (200,) * 8), (512, (64, 128))],
)
HALF_UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def make(backend: type[TorchFlash | FlashAttn]) -> Backend:
    try:
        return backend()
    except ImportError as error:
        pytest.skip(f"flash-attn: {error}")


def computed(
    groups: Groups, backend: Backend, tensors: list[torch.Tensor], device: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    row = [tensor.detach().to(device, dtype).requires_grad_() for tensor in tensors]
    output = VarlenLayout.build(groups, backend, device).attend(0, *row, row[0].shape[-1] ** -0.5)
    weights = torch.randint(-4, 5, output.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    gradients = torch.autograd.grad((output * weights).sum(), row)
    return [tensor.detach().double().cpu() for tensor in (output, *gradients)]


@pytest.mark.parametrize("backend", [TorchFlash, FlashAttn])
@pytest.mark.parametrize("dtype", HALF_UNIT)
@pytest.mark.parametrize("width", [64, 128, 80, 20])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_kernels_compute_what_the_reference_does(
    backend: type[TorchFlash | FlashAttn], dtype: torch.dtype, width: int, groups: Groups
) -> None:
    tensors = row_tensors(groups, 12, 2, width, dtype)
    found = computed(groups, make(backend), tensors, "cuda", dtype)
    expected = computed(groups, Reference(), tensors, "cpu", torch.float64)
    for one, other in zip(found, expected, strict=True):
        # the reference's own six roundings (numerics/test_varlen.py), and the kernels round weights
        # and ds before products
        assert float((one - other).norm()) <= 4 * HALF_UNIT[dtype] * float(other.norm())


def test_large_common_logits_cost_no_more(record_property: Callable[[str, object], None]) -> None:
    # the heads of real models: all scores near -120
    groups = [(300, (100, 100))]
    query, key, value = row_tensors(groups, 4, 2, 64, torch.bfloat16)
    offset = torch.zeros(64)
    offset[0] = 31.0
    shifted = [(query + offset).detach().bfloat16(), (key - offset).detach().bfloat16(), value]
    found = computed(groups, TorchFlash(), shifted, "cuda", torch.bfloat16)
    expected = computed(groups, Reference(), shifted, "cpu", torch.float64)
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]
    record_property("errors", errors)
    assert errors[0] <= 4 * HALF_UNIT[torch.bfloat16]


def test_a_policy_on_cuda_learns_without_padding(
    tiny_folder: Callable[..., Path], make_train_groups: Callable[..., list[TrainGroup]]
) -> None:
    policy = load_policy(tiny_folder("qwen2_vl"), dtype="bfloat16", device="cuda")
    choice = choose_attention(policy.device, policy.dtype, policy.kv_shape[2])
    assert choice.backend is not None, choice.reason
    groups = [group.rollout for group in make_train_groups("qwen2_vl", 4)]
    items = [PackItem(group.prompt, tuple(TrainSequence(c, 1.0) for c in group.completions)) for group in groups]
    shapes = [
        (len(group.prompt.token_ids), [n for c in group.completions if (n := len(c.token_ids) - 1)]) for group in groups
    ]
    batch = pack(items, policy)
    assert isinstance(batch.layout, VarlenLayout)
    padded = replace(batch, layout=PackedLayout.build(shapes, policy.device))
    with torch.no_grad():
        difference = packed_logprobs(policy, batch, 1.0)[0] - packed_logprobs(policy, padded, 1.0)[0]
    # as engine and learner in bfloat16 (test_cuda.py)
    assert float(difference.abs().mean()) < 0.025


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_vision_tower_on_cuda_attends_to_all_images_at_once(
    family: str, tiny_folder: Callable[..., Path], make_prompt: Callable[..., Prompt]
) -> None:
    on_cpu, on_gpu = load_policy(tiny_folder(family)), load_policy(tiny_folder(family), dtype="bfloat16", device="cuda")
    assert on_gpu.model.config.vision_config._attn_implementation == VISION_ATTENTION_NAME
    prompts = [make_prompt(family, index, length=4, grid=grid) for index, grid in enumerate(((8, 8), (4, 6), (2, 10)))]
    features = []
    for policy in (on_cpu, on_gpu):
        images = merge_image_inputs([policy.image_inputs(prompt) for prompt in prompts])
        tower = policy.model.base_model.visual
        with torch.no_grad():
            output = tower(images["pixel_values"].to(policy.dtype), grid_thw=images["image_grid_thw"]).pooler_output
        features.append(output.float().cpu())
    # two blocks of a dozen roundings each
    assert float((features[1] - features[0]).norm()) <= 20 * HALF_UNIT[torch.bfloat16] * float(features[0].norm())
