"""The benchmark at Qwen2-VL-2B's size, here at a small one: engine, learner, transformers agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.geometry_2b import main


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_learner_and_transformers_agree(dtype: str, tmp_path: Path) -> None:
    given = ["--geometry", "small", "--dtype", dtype, "--visual-tokens", "16", "--prompt-tokens", "80"]
    found = main([*given, "--out", str(tmp_path), "--threads", "1"])
    logprobs = found["logprobs"]
    assert logprobs["tokens"] == 4 * 11
    assert 0 < logprobs["engine_learner_max"] <= logprobs["bound"]
    assert logprobs["transformers_learner_max"] <= logprobs["bound"]
    assert found["memory_gib"]["terms"]["weights"] > 0
    written = json.loads((tmp_path / f"geometry_small_{dtype}.json").read_text(encoding="utf-8"))
    assert written["logprobs"] == logprobs
