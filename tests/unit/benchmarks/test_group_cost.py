"""The sweep finds which law a group's cost follows; no test asserts a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common import fit
from benchmarks.group_cost import EACH, ONCE, describe, fit_laws, load, sweep
from benchmarks.rollout_sides import Workload


def points_of(law):
    return [
        {"length": length, "group_size": size, "max_tokens": 10, "seconds": {"median_s": law(length, size * 10, size)}}
        for length in (54, 300, 800)
        for size in (2, 8, 32)
    ]


@pytest.mark.parametrize("paid", [ONCE, EACH])
def test_the_law_with_the_smaller_residual_is_the_one_that_made_the_numbers(paid: str) -> None:
    times = {ONCE: lambda size: 1, EACH: lambda size: size}[paid]
    laws = fit_laws(points_of(lambda prompt, sampled, size: 0.5 + 2e-3 * times(size) * prompt + 3e-3 * sampled))
    right = laws[paid]
    assert (right["group"], right["prompt_token"], right["completion_token"]) == pytest.approx((0.5, 2e-3, 3e-3))
    assert right["residual"] < 1e-9
    assert laws[EACH if paid == ONCE else ONCE]["residual"] > 0.05
    assert "500.0 ms + 2000.0 us" in describe("native", laws)[0 if paid == ONCE else 1]


def test_the_residual_is_a_share_of_the_mean() -> None:
    found = fit({"fixed": [1.0, 1.0]}, [3.0, 5.0])
    assert found == {"fixed": 4.0, "residual": 0.25, "r2": 0.0}


def test_a_sweep_measures_every_workload_on_every_side(tmp_path: Path) -> None:
    folder, _, policy = load(None, tmp_path)
    works = [Workload(length, size, 1, 3) for length in (60, 90) for size in (2, 3)]
    points = sweep(folder, policy, works, ["dynamic"], 1, tmp_path / "sweep")
    assert set(points) == {"native", "generate_dynamic"}
    for found in points.values():
        assert [(point["length"], point["group_size"]) for point in found] == [(60, 2), (60, 3), (90, 2), (90, 3)]
        assert all(len(point["seconds"]["runs_s"]) == 1 for point in found)
