"""The decoder for sampling as a CUDA graph; skipped without a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlmed.models.attention import PackedLayout
from rlmed.models.policy import load_policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2"])
def test_a_graph_computes_what_single_operators_do(family: str, dtype: str, tiny_folder: Callable[..., Path]) -> None:
    policy = load_policy(tiny_folder(family), dtype=dtype, device="cuda")
    assert policy.decoder is not None
    tokens = torch.randint(20, 300, (13,), device="cuda")
    positions = torch.arange(13, device="cuda").expand(3 if policy.family.vision else 1, -1)
    layout = PackedLayout.build([(5, (3, 5))], "cuda")
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            policy.hidden(tokens, positions, layout)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            states = policy.hidden(tokens, positions, layout)
        for _ in range(3):
            tokens.random_(20, 300)
            graph.replay()
            expected = policy.hidden(tokens, positions, layout)
            torch.testing.assert_close(states, expected, atol=1e-5 if dtype == "float32" else 0.05, rtol=0)
