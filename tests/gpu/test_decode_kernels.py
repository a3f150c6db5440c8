"""The engine's decode steps in Triton kernels: on a CUDA device, or anywhere with
TRITON_INTERPRET=1.

`tests/numerics/test_kernels.py` runs this file under Triton's interpreter.
"""

from __future__ import annotations

from tests.engine_runs import completions_of
from tests.gpu.triton_device import DEVICE, INTERPRETED, MARKS

# isort: split

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlmed.core.types import Prompt, RolloutRequest, SamplingParams
from rlmed.models.decode_kernels import KernelKind, probe_layers, probe_sampler
from rlmed.models.decoder import Decoder
from rlmed.models.kernels import decoder as kernel_decoder
from rlmed.models.kernels.sampling import sample
from rlmed.models.policy import Policy, load_policy
from rollout.native.slots import StepPlan

pytestmark = MARKS
TRITON = KernelKind("Triton", kernel_decoder.KernelDecoder, sample)
# a page holds a few tokens only, so that sequences have several
PLAN = StepPlan(page_tokens=8, buckets=True, lag=0, graphs=False, kernels=True)


def load(family: str, tiny_folder: Callable[..., Path], dtype: str = "float32") -> Policy:
    torch.backends.cuda.matmul.allow_tf32 = False
    return load_policy(tiny_folder(family), dtype=dtype, device=DEVICE)


def requests_of(prompts: list[Prompt], most_tokens: int) -> list[RolloutRequest]:
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"temperature": 0.0}]
    return [
        RolloutRequest(i, prompt, (3, 1, 4)[i % 3], SamplingParams(max_tokens=most_tokens - 4 * i, seed=i, **setting))
        for i, (prompt, setting) in enumerate(zip(prompts, settings, strict=True))
    ]


@pytest.mark.parametrize("family", ["qwen2_vl"] if INTERPRETED else ["qwen2_vl", "qwen2_5_vl", "qwen2", "llama"])
def test_kernels_sample_what_torch_does(
    family: str,
    tiny_folder: Callable[..., Path],
    mixed_prompts: Callable[..., list[Prompt]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ragged groups, one of a single completion, several pages, free rows and groups."""
    policy = load(family, tiny_folder)
    kernels = policy.decode_kernels()
    assert str(kernels) == "Triton kernels"
    work = requests_of(mixed_prompts(family, 3), 17)
    expected = completions_of(policy, dataclasses.replace(PLAN, kernels=False), work)
    calls = []
    computed = kernel_decoder.KernelDecoder.__call__
    monkeypatch.setattr(
        kernel_decoder.KernelDecoder,
        "__call__",
        lambda decoder, embeddings, *rest, **named: (
            calls.append(len(embeddings)) or computed(decoder, embeddings, *rest, **named)
        ),
    )
    actual = completions_of(policy, PLAN, work)
    assert len(calls) > 10
    assert [c.token_ids.tolist() for c in actual] == [c.token_ids.tolist() for c in expected]
    assert max(len(c.token_ids) for c in actual) > PLAN.page_tokens  # type: ignore[operator]
    for one, other in zip(actual, expected, strict=True):
        # float32 sums in another order, through layers with peaked distributions
        np.testing.assert_allclose(one.rollout_logprobs, other.rollout_logprobs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2", "llama"])
def test_probe_accepts_every_family_of_such_layers(family: str, tiny_folder: Callable[..., Path]) -> None:
    kernels = load(family, tiny_folder).decode_kernels()
    assert str(kernels) == "Triton kernels"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not round to bfloat16")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen2", "llama"])
def test_probe_accepts_bfloat16(family: str, tiny_folder: Callable[..., Path]) -> None:
    assert str(load(family, tiny_folder, "bfloat16").decode_kernels()) == "Triton kernels"


def test_other_layers_keep_torchs_operators(
    tiny_folder: Callable[..., Path], mixed_prompts: Callable[..., list[Prompt]]
) -> None:
    """Qwen3 norms queries and keys, which no kernel does."""
    policy = load("qwen3", tiny_folder)
    kernels = policy.decode_kernels()
    assert kernels.decoder is None
    assert kernels.sample is not None
    assert "other parts" in str(kernels)
    work = requests_of(mixed_prompts("qwen3", 3), 12)[:2]
    expected = completions_of(policy, dataclasses.replace(PLAN, kernels=False), work)
    assert [c.token_ids.tolist() for c in completions_of(policy, PLAN, work)] == [
        c.token_ids.tolist() for c in expected
    ]


def test_probe_rejects_another_epsilon_and_activation(tiny_folder: Callable[..., Path]) -> None:
    modules: Any = load("qwen2_vl", tiny_folder).model.get_decoder()

    def other_epsilon(probed: Any) -> Decoder:
        decoder = Decoder(probed)
        decoder.layers = [
            dataclasses.replace(layer, mlp_norm=dataclasses.replace(layer.mlp_norm, epsilon=1e-5))
            for layer in decoder.layers
        ]
        return decoder

    assert probe_layers(modules, 3, TRITON) == ""
    assert "off by" in probe_layers(modules, 3, TRITON, other_epsilon)
    mlp = modules.layers[-1].mlp
    mlp.__dict__.pop("forward", None)  # on a CPU, a fused one that was accepted for SiLU
    mlp.act_fn = torch.nn.GELU()
    assert f"layer {len(modules.layers) - 1} is off by" in probe_layers(modules, 3, TRITON)


def test_a_kernel_that_fails_is_not_used(tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load("qwen2_vl", tiny_folder)

    def fails(*_: Any) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(kernel_decoder, "rope_append", fails)
    assert str(policy.decode_kernels()) == "Triton sampler, else torch operators (a kernel failed: no compiler)"


def test_probe_rejects_a_wrong_sampler() -> None:
    device = torch.device(DEVICE)
    assert probe_sampler(sample, 2500, device) == ""
    assert "other tokens" in probe_sampler(lambda x, u, t, g: sample(x, 1 - u, t, g), 2500, device)
    assert "differs" in probe_sampler(lambda x, u, t, g: (sample(x, u, t, g)[0], t * 0), 2500, device)


@pytest.mark.skipif(INTERPRETED, reason="graphs need a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_of_kernels_sample_what_single_ones_do(
    dtype: str, tiny_folder: Callable[..., Path], mixed_prompts: Callable[..., list[Prompt]]
) -> None:
    policy = load("qwen2_vl", tiny_folder, dtype)
    plan = StepPlan.for_device(policy.device)
    assert plan.kernels
    assert plan.graphs
    work = requests_of(mixed_prompts("qwen2_vl", 3), 40)
    expected = completions_of(policy, dataclasses.replace(plan, graphs=False), work)
    for _ in range(3):
        assert [c.token_ids.tolist() for c in completions_of(policy, plan, work)] == [
            c.token_ids.tolist() for c in expected
        ]


def test_splits_fill_the_device_and_leave_short_sequences_whole() -> None:
    assert kernel_decoder.splits(4, 100) == 1
    assert kernel_decoder.splits(4, 1024) == 8
    assert kernel_decoder.splits(32, 4096) == 8
    assert kernel_decoder.splits(500, 4096) == 1
