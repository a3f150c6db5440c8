"""What a run checks after each step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from rlmed.run import Run


def run(limit: float | None) -> Run:
    config = SimpleNamespace(rollout=SimpleNamespace(max_mismatch_kl=limit, engine="vllm"))
    return cast(Run, SimpleNamespace(config=config))


@pytest.mark.parametrize("mismatch", [2e-6, float("nan"), float("inf")])
def test_a_mismatch_above_the_limit_ends_the_run_as_a_mistake_that_a_retry_does_not_fix(mismatch: float) -> None:
    with pytest.raises(ValueError, match=r"step 7: mismatch_kl=.* rollout\.max_mismatch_kl=1e-06"):
        Run._check_agreement(run(1e-6), 7, {"mismatch_kl": mismatch})


@pytest.mark.parametrize(
    ("limit", "metrics"), [(1e-6, {"mismatch_kl": 1e-6}), (1e-6, {}), (None, {"mismatch_kl": 1.0})]
)
def test_a_mismatch_within_the_limit_or_without_one_does_not(limit: float | None, metrics: dict[str, float]) -> None:
    Run._check_agreement(run(limit), 7, metrics)
