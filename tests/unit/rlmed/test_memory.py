"""The estimate counts what is really allocated."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable

import pytest

from rlmed.commandline import compose_config
from rlmed.core.config import RunConfig
from rlmed.memory import estimate
from rlmed.models.policy import Policy
from rollout.native.kv_cache import KVCache


def config(*overrides: str) -> RunConfig:
    return compose_config("train", overrides)


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
    found = estimate(policy, settings)
    parameters = sum(parameter.numel() for parameter in policy.model.parameters())
    assert found.weights == found.reference == parameters * policy.dtype.itemsize
    assert found.optimizer == parameters * optimizer_bytes

    cache = KVCache(policy.kv_shape, dtype=policy.dtype, device=policy.device)
    cache.reserve(groups=groups, prompt_length=32, rows=8, max_tokens=longest)
    tensors = [*cache.prefix_keys, *cache.prefix_values, *cache.suffix_keys, *cache.suffix_values]
    assert found.kv_cache == sum(tensor.nbytes for tensor in tensors)
    assert f"{found.total / 2**30:.2f}" in found.line()


def test_what_is_frozen_or_left_out_costs_nothing(fresh_policy: Callable[..., Policy]) -> None:
    policy = fresh_policy("qwen2_vl")
    full = estimate(policy, config())
    policy.freeze(["vision", "merger"])
    frozen = estimate(policy, config("algo.kl_coef=0"))
    assert frozen.reference == 0
    assert 0 < frozen.optimizer < full.optimizer


@pytest.mark.slow
def test_freed_memory_is_kept_where_the_c_library_is_glibc():
    code = "from rlmed.memory import keep_freed_memory; import sys; sys.exit(0 if keep_freed_memory() else 3)"
    status = subprocess.run([sys.executable, "-c", code], check=False).returncode
    assert status == (0 if platform.libc_ver()[0] == "glibc" else 3)
