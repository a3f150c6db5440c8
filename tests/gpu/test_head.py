"""The vocabulary projection and the patch embedding on a CUDA device against float64; skipped
without one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlmed.core.types import Prompt
from rlmed.models import logprobs as module
from rlmed.models.logprobs import CUDA_BYTES, chunked_logprobs, logprobs_no_grad, masked_logits
from rlmed.models.policy import load_policy
from tests.rounding import rounding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

VOCABULARY, WIDTH = 5000, 256
BANNED = (3, 4999)
STORED = {torch.float32: 0.0, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}
"""Relative error of storing a number in the parameters' dtype."""


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def definition(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T).index_fill(1, torch.tensor(BANNED), -torch.inf)
    log_softmax = logits.log_softmax(1)
    probabilities = log_softmax.exp()
    entropy = -(log_softmax.index_fill(1, torch.tensor(BANNED), 0.0) * probabilities).sum(1)
    return log_softmax.gather(1, targets[:, None])[:, 0], entropy


def computed(
    function: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor, targets: Tensor, **settings: object
) -> list[Tensor]:
    """Log-probabilities, entropies and both gradients, in float64 on the CPU."""
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = function(hidden, weight, targets, **settings)
    scale = torch.linspace(-1, 2, len(targets)).to(logprobs)
    gradients = torch.autograd.grad((logprobs * scale).sum(), (hidden, weight))
    return [tensor.detach().double().cpu() for tensor in (logprobs, entropy, *gradients)]


@pytest.mark.parametrize("tokens", [VOCABULARY, 1024, 999])
@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("dtype", STORED)
def test_values_and_gradients_are_those_of_the_definition(
    dtype: torch.dtype, rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CUDA_BYTES", 4 * max(rows, WIDTH) * tokens)
    if tokens < VOCABULARY:
        monkeypatch.setattr(module, "_fits", lambda rows, weight: False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / 4).to(dtype)
    targets = torch.randint(5, VOCABULARY - 1, (rows,), generator=generator)
    on_gpu = [tensor.cuda() for tensor in (hidden, weight, targets)]
    banned = torch.tensor(BANNED, device="cuda")
    found = computed(chunked_logprobs, *on_gpu, temperature=1.0, banned=banned)
    frozen = logprobs_no_grad(*on_gpu, temperature=1.0, banned=banned)
    assert torch.equal(frozen.double().cpu(), found[0])
    expected = computed(definition, hidden.double(), weight.double(), targets)
    magnitude = float((hidden.double().abs() @ weight.double().abs().T).max()) if rows else 1.0
    for one, other in zip(found[:2], expected[:2], strict=True):  # in bfloat16 too
        torch.testing.assert_close(one, other, atol=rounding(WIDTH + 16, magnitude), rtol=0)
    for one, other in zip(found[2:], expected[2:], strict=True):
        # both factors of a product are rounded, and its result
        bound = 3 * STORED[dtype] * float(other.norm()) + rounding(VOCABULARY, magnitude)
        assert float((one - other).norm()) <= bound


@pytest.mark.parametrize("common", [120.0, -120.0])
def test_logits_near_120_keep_their_differences(common: float) -> None:
    steps = torch.arange(8) / 32
    hidden = torch.tensor([[8.0, 1.0] + [0.0] * 14], dtype=torch.bfloat16, device="cuda").expand(40, 16).contiguous()
    weight = torch.zeros(8, 16, dtype=torch.bfloat16, device="cuda")
    weight[:, 0], weight[:, 1] = common / 8, steps
    logits = masked_logits(hidden, weight, torch.zeros(0, dtype=torch.int64, device="cuda"))
    assert torch.equal(logits.cpu(), (common + steps).expand(40, 8))


def test_the_head_of_a_2b_model_stays_within_its_memory() -> None:
    rows, width, vocabulary = 8192, 1536, 151_936
    hidden = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = (torch.randn(vocabulary, width, dtype=torch.bfloat16, device="cuda") / 20).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    banned = torch.arange(151_652, 151_657, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprobs, _ = chunked_logprobs(hidden, weight, targets, temperature=1.0, banned=banned)
    logprobs.sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    narrow = 4 * rows * width * 4
    cublas = 64 * 2**20  # its workspace
    assert peak <= 2 * CUDA_BYTES + 2 * (rows + vocabulary) * width + narrow + cublas
    assert peak < rows * vocabulary * 4 / 2


class Convolutions(TorchDispatchMode):
    """Counts convolutions."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "conv" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_patches_are_embedded_without_a_convolution(
    family: str, dtype: str, tiny_folder: Callable[..., Path], make_prompt: Callable[..., Prompt]
) -> None:
    policy = load_policy(tiny_folder(family), dtype=dtype, device="cuda")
    images = policy.image_inputs(make_prompt(family, 0, length=4, grid=(8, 8)))
    tower = policy.model.base_model.visual
    with Convolutions() as found, torch.no_grad():
        tower(images["pixel_values"], grid_thw=images["image_grid_thw"])
        embedded = tower.patch_embed(images["pixel_values"])
    assert found.count == 0
    weight, patches = tower.patch_embed.proj.weight.detach().flatten(1), images["pixel_values"].to(policy.dtype)
    right = patches.double() @ weight.double().T
    magnitude = float((patches.double().abs() @ weight.double().abs().T).max())
    bound = rounding(weight.shape[1], magnitude) + STORED[policy.dtype] * right.abs()
    assert ((embedded.double() - right).abs() <= bound).all()
