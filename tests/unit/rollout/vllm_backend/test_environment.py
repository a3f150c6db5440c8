"""What a process of vLLM is given before it starts."""

from __future__ import annotations

import os

import pytest

from rollout.vllm_backend.environment import prepare_cpu_server

SPACE = "VLLM_CPU_KVCACHE_SPACE"


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("4", "4")])
def test_a_cpu_server_takes_one_gib_unless_told(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setenv(SPACE, "")  # so that it is restored
    monkeypatch.delenv(SPACE) if before is None else monkeypatch.setenv(SPACE, before)
    prepare_cpu_server()
    assert os.environ[SPACE] == after
