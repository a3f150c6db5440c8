"""The debug modes of `conf/debug/`: sampling alone, learning from samples, a model-free engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlmed.core.config.checks import ConfigError
from rlmed.core.config.schema import RunConfig
from rlmed.run import Run
from tests.rounding import LOGPROBS

pytestmark = pytest.mark.slow

Config = Callable[..., RunConfig]
ROUNDING = LOGPROBS
"""Of metrics up to about 1: the gradient's norm is clipped, the loss is a mean of advantages."""
QUIET = ("preflight.enabled=false", "eval.at_start=false", "eval.at_end=false", "rollout.max_tokens=20")


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def rewarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A reward with some spread for a model that knows nothing."""
    (tmp_path / "parity.py").write_text(
        "def parity(example, completion):\n    return float(completion.token_ids[0] % 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "reward.extra=[parity:parity]"


def test_what_one_run_samples_another_learns_from(make_config: Config, tmp_path: Path, rewarded: str) -> None:
    sampled, learnt, whole = (tmp_path / name for name in ("sampled", "learnt", "whole"))
    Run(make_config(*QUIET, rewarded, "steps=1", "+debug=rollouts_only"), sampled).execute()
    assert "grad_norm" not in metrics(sampled)[0]
    assert not (sampled / "checkpoints").exists()
    Run(
        make_config(*QUIET, rewarded, "steps=1", "+debug=recorded", f"debug.recorded={sampled}/batches"), learnt
    ).execute()
    Run(make_config(*QUIET, rewarded, "steps=1"), whole).execute()
    for name in ("loss", "grad_norm", "reward/mean", "entropy"):
        assert metrics(learnt)[0][name] == pytest.approx(metrics(whole)[0][name], abs=ROUNDING), name
    # the look before the first step takes none of them
    Run(
        make_config(*QUIET[1:], rewarded, "steps=1", "+debug=recorded", f"debug.recorded={sampled}/batches"),
        tmp_path / "looked",
    ).execute()
    assert metrics(tmp_path / "looked")[0]["loss"] == pytest.approx(metrics(whole)[0]["loss"], abs=ROUNDING)
    # fewer batches than steps begin again
    Run(
        make_config(*QUIET, rewarded, "steps=3", "+debug=recorded", f"debug.recorded={sampled}/batches"),
        tmp_path / "more",
    ).execute()
    assert [line["step"] for line in metrics(tmp_path / "more")] == [1, 2, 3]


def test_the_fake_engine_stands_in_for_the_model(make_config: Config, tmp_path: Path) -> None:
    config = make_config(*QUIET[:3], "rollout.max_tokens=60", "+debug=fake_engine", "algo.group_size=6")
    Run(config, tmp_path / "run").execute()
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    completions = [entry for row in rows for entry in row["completions"]]
    assert {entry["reward_parts"]["format"] for entry in completions} == {1.0}
    assert {entry["reward_parts"]["choice"] for entry in completions} == {0.0, 1.0}
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / "run"))


def test_mistakes_are_named(make_config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"debug\.learn=false .*debug\.recorded=x"):
        make_config("+debug=rollouts_only", "debug.recorded=x")
    with pytest.raises(ValueError, match=r"no recorded batches .*nowhere.*debug\.record=true"):
        Run(make_config("+debug=recorded", f"debug.recorded={tmp_path}/nowhere"), tmp_path / "run")
