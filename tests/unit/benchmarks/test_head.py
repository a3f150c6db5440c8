"""The sides of the head's benchmark do the same work, and its limits are what products and moves
take.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import head
from benchmarks.head import SIDES, Case, make_side, run_case
from tests.rounding import LOGPROBS

CASE = Case("a head", vocabulary=300, width=20, rows=40, dtype="float32", learns=True)


def test_limits_of_a_case():
    # 2 * 40 * 300 * 20 = 480,000 operations a product, 24,000 bytes of weights
    assert CASE.limit(0.001, 0.0001) == {"arithmetic_s": 1.44, "memory_s": 0.72}
    sampling = Case("a head", vocabulary=300, width=20, rows=40, dtype="bfloat16", learns=False)
    assert sampling.limit(0.001, 0.0001) == {"arithmetic_s": 0.48, "memory_s": 0.12}


@pytest.mark.parametrize("learns", [True, False])
def test_the_sides_compute_the_same(learns):
    case = Case("a head", vocabulary=300, width=20, rows=40, dtype="float32", learns=learns)
    ours, theirs = (make_side(case, side)() for side in SIDES)
    assert ours.shape == ((40,) if learns else (40, 300))
    torch.testing.assert_close(ours, theirs, atol=LOGPROBS, rtol=0)


@pytest.mark.slow
def test_a_case_is_measured_in_processes_of_its_own(tmp_path: Path):
    found = run_case(CASE, argparse.Namespace(rounds=2, threads=1), tmp_path)
    assert found["vocabulary"] == 300
    assert all(len(found[side]["runs_s"]) == 2 and found[side]["peak_mib"] >= 0 for side in SIDES)
    assert found["share_of_limit"] > 0


def test_sides_that_differ_stop_the_benchmark(monkeypatch):
    monkeypatch.setattr(head, "settle_products", lambda *_: ())
    monkeypatch.setattr(head, "torch_logprobs", lambda hidden, weight, targets: (hidden @ weight.T).sum(1))
    with pytest.raises(SystemExit, match="the sides differ by"):
        head.run_times(CASE, 1)
