"""The estimate counts what is really allocated."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable

import pytest

from rlmed.cluster.memory import MemoryEstimate, engines_that_pack, estimate
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.core.types import Prompt, RolloutRequest, SamplingParams
from rlmed.models.cpu import products
from rlmed.models.policy import Policy
from rollout.native.engine import NativeEngine
from rollout.native.kv_pages import PagePool
from tests.root import ROOT


def config(*overrides: str) -> RunConfig:
    return compose_config("train", overrides)


def estimated(policy: Policy, settings: RunConfig, packing_engines: int = 0) -> MemoryEstimate:
    return estimate(
        policy,
        settings.rollout,
        settings.algo,
        prompt_tokens=settings.data.max_prompt_tokens,
        eval_tokens=settings.eval.max_tokens,
        packing_engines=packing_engines,
        pictures=7 * 2**20,
    )


@pytest.mark.parametrize(("dtype", "optimizer_bytes"), [("float32", 12), ("bfloat16", 16)])
@pytest.mark.parametrize(
    # evaluation has a prompt for each completion, training one for each group
    ("max_tokens", "eval_tokens", "groups", "longest"),
    [(16, 24, 8, 24), (512, 8, 2, 512)],
)
def test_counts(
    max_tokens: int,
    eval_tokens: int,
    groups: int,
    longest: int,
    dtype: str,
    optimizer_bytes: int,
    fresh_policy: Callable[..., Policy],
) -> None:
    policy = fresh_policy("qwen2_vl", dtype=dtype)
    settings = config(
        "algo.group_size=4",
        "rollout.max_completions=8",
        f"rollout.max_tokens={max_tokens}",
        "data.max_prompt_tokens=32",
        f"eval.max_tokens={eval_tokens}",
    )
    found = estimated(policy, settings)
    parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    assert found.weights == found.reference == parameters * policy.dtype.itemsize
    assert found.optimizer == parameters * optimizer_bytes
    assert found.pictures == 7 * 2**20
    assert found.total > sum((found.weights, found.reference, found.optimizer, found.kv_cache))

    prefix, suffix = (
        PagePool(policy.kv_shape, page_tokens=None, dtype=policy.dtype, device=policy.device) for _ in range(2)
    )
    prefix.reserve(sequences=groups, tokens=32)
    suffix.reserve(sequences=8, tokens=longest)
    tensors = [*prefix.keys, *prefix.values, *suffix.keys, *suffix.values]
    # one page of each pool is nobody's
    assert found.kv_cache == sum(tensor[1:].nbytes for tensor in tensors)
    assert f"{found.total / 2**30:.2f}" in found.line()


def test_what_is_frozen_or_left_out_costs_nothing(fresh_policy: Callable[..., Policy]) -> None:
    policy = fresh_policy("qwen2_vl")
    full = estimated(policy, config())
    policy.freeze(["vision", "merger"])
    frozen = estimated(policy, config("algo.loss.kl_coef=0"))
    assert frozen.reference == 0
    assert 0 < frozen.optimizer < full.optimizer


@pytest.mark.skipif(not products.has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2", "qwen3"])
def test_packed_weights_are_counted(
    family: str,
    fresh_policy: Callable[..., Policy],
    make_prompt: Callable[..., Prompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = fresh_policy(family)
    monkeypatch.setattr(products._Choice, "uses", frozenset(["packed_weights"]))
    engine = NativeEngine(policy, lambda _: "")
    policy.end_token_ids = frozenset()
    engine.submit(RolloutRequest(0, make_prompt(family, 0, length=9), 2, SamplingParams(max_tokens=4)))
    for _ in range(3):
        engine.step()
    joined = [parameters for parameters, *_ in engine._packs._packs.values()]
    held = sum(one.nbytes for parameters in joined for one in parameters if one.ndim > 1)
    assert estimated(policy, config(), packing_engines=1).packed == held > 0
    overlapped = estimated(policy, config("algo.max_staleness=1"), packing_engines=2)
    assert overlapped.packed == 2 * held
    assert overlapped.total > overlapped.weights + overlapped.reference + overlapped.optimizer + overlapped.kv_cache
    assert estimated(fresh_policy(family, dtype="bfloat16"), config(), packing_engines=1).packed == 0


@pytest.mark.parametrize(
    ("overrides", "engines"),
    [
        ((), 1),
        (("algo.max_staleness=2",), 2),
        (("cluster=ray", "cluster.rollout_workers=3"), 3),
        (("cluster=ray", "cluster.rollout_workers=1", "algo.max_staleness=2"), 1),
    ],
)
def test_engines_that_pack_on_one_machine(overrides: tuple[str, ...], engines: int) -> None:
    settings = config(*overrides)
    assert engines_that_pack(settings.cluster, max_staleness=settings.algo.max_staleness) == engines


@pytest.mark.slow
def test_freed_memory_is_kept_where_the_c_library_is_glibc():
    code = (
        "import tests.prepared, sys; from rlmed.cluster.memory import keep_freed_memory; "
        "sys.exit(0 if keep_freed_memory() else 3)"
    )
    status = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode
    assert status == (0 if platform.libc_ver()[0] == "glibc" else 3)
