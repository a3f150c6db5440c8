"""Runs that go on for longer than planned, or start anew in the folder of an attempt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlmed import launch, sft
from rlmed.core.config.schema import RunConfig
from rlmed.run import Run

pytestmark = pytest.mark.slow

SPREAD = """
def first_token(example, completion):
    return float(completion.token_ids[0] % 7)
"""
OWN = ("reward.extra=[spread_otherwise:first_token]", "preflight.enabled=false", "learner.lr_schedule=constant")


@pytest.fixture
def train(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`train("run", "steps=3")`: the folder of a run in this process, of up to three steps."""
    (tmp_path / "spread_otherwise.py").write_text(SPREAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(name: str, *overrides: str, main: Callable[[RunConfig, Path], None] = launch.main) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        main(make_config(*OWN, *overrides), folder)
        return folder

    return run


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def steps_of(path: Path) -> list[Any]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_run_of_two_steps_goes_on_to_a_third_as_if_it_had_three_from_the_start(train: Callable[..., Path]) -> None:
    quick = ("eval.at_start=false", "eval.at_end=false")
    whole = train("whole", "steps=3", *quick)
    longer = train("longer", "steps=2", *quick)
    for name in ("batches/000003.npz", "evaluations/step-000003/rows.jsonl"):  # of a killed attempt at more
        (longer / name).parent.mkdir(parents=True)
        (longer / name).write_text("")
    with pytest.raises(ValueError, match="with steps=2, and steps=1 would end it earlier"):
        train("longer", "steps=1", "resume=auto", *quick)
    train("longer", "steps=3", "resume=auto", *quick)
    assert steps_of(longer / "metrics.jsonl") == [1, 2, 3]
    expected, got = weights(whole, 3), weights(longer, 3)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [*(longer / "batches").iterdir(), *(longer / "evaluations").iterdir()] == []


def test_fine_tuning_goes_on_for_more_epochs(train: Callable[..., Path]) -> None:
    quick = ("eval.at_start=false", "eval.at_end=false", "sft.batch_size=5")
    whole = train("whole", "sft.epochs=2", *quick, main=sft.main)
    longer = train("longer", "sft.epochs=1", *quick, main=sft.main)
    train("longer", "sft.epochs=2", "resume=auto", *quick, main=sft.main)
    assert steps_of(longer / "metrics.jsonl") == [1, 2, 3, 4]
    expected, got = weights(whole, 4), weights(longer, 4)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_an_attempt_without_a_checkpoint_may_start_anew_with_other_settings(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Run._save
    monkeypatch.setattr(Run, "_save", lambda run, step: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        train("run", "debug.record=true", "checkpoint.every=2", "eval.every=1")
    monkeypatch.setattr(Run, "_save", attempt)
    folder = train("run", "resume=auto", "seed=5", "steps=1", "eval.at_start=false", "eval.controls=false")
    assert [path.name for path in (folder / "evaluations").iterdir()] == ["step-000001"]
    assert not (folder / "batches").exists()
    assert steps_of(folder / "metrics.jsonl") == [1]
    assert "seed: 5" in (folder / "config.yaml").read_text()
    assert (folder / "report.html").is_file()
