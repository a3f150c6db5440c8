"""A run killed at any moment and resumed ends with the weights of one that is not, bit for bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration import launch_and_die
from tests.integration.forked import Finished, run_forked
from tests.integration.short_run import SHORT_RUN, STEPS


def launch(place: str, outputs: Path, *overrides: str) -> Finished:
    return run_forked(launch_and_die.main, [place, *SHORT_RUN, *overrides], outputs)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, with_images: Callable[[Path], Path]) -> Path:
    return with_images(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def uninterrupted(workplace: Path) -> Path:
    folder = workplace / "whole"
    done = launch("nowhere", workplace, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.output
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["rollout:18", "backward:3", "optimizer:3", "checkpoint:4", "metrics:1", "report:1"])
def test_killed_and_resumed_equals_uninterrupted(place: str, workplace: Path, uninterrupted: Path) -> None:
    folder = workplace / place.replace(":", "_")
    killed = launch(place, workplace, f"hydra.run.dir={folder}")
    assert killed.returncode == -signal.SIGKILL, killed.output
    resumed = launch(
        "nowhere",
        workplace,
        f"resume={folder}" if list(folder.glob("checkpoints/step-*")) else f"hydra.run.dir={folder}",
    )
    assert resumed.returncode == 0, resumed.output

    expected, got = weights(uninterrupted), weights(folder)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), f"{name} differs after {place}"
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
    indices = [line["index"] for line in lines(folder / "rollouts.jsonl")]
    assert indices == [line["index"] for line in lines(uninterrupted / "rollouts.jsonl")]
    assert len(set(indices)) == len(indices)
    assert (folder / "report.html").is_file()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert [path.name for path in folder.glob(".*")] == [".hydra"]


@pytest.mark.slow
def test_adapters_killed_and_resumed_equal_uninterrupted(workplace: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra lora")
    settings = ("learner=lora", "learner.lora.dropout=0.1", "learner.lora.target=[vision,language_model]")
    whole, folder = workplace / "lora", workplace / "lora_killed"
    assert launch("nowhere", workplace, *settings, f"hydra.run.dir={whole}").returncode == 0
    killed = launch("checkpoint:4", workplace, *settings, f"hydra.run.dir={folder}")
    assert killed.returncode == -signal.SIGKILL, killed.output
    resumed = launch("nowhere", workplace, *settings, f"resume={folder}")
    assert resumed.returncode == 0, resumed.output
    expected, got = (
        load_file(run / "checkpoints" / f"step-{STEPS:06d}" / "adapter_model.safetensors") for run in (whole, folder)
    )
    assert expected.keys() == got.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_resumed_curriculum_asks_the_same_prompts(workplace: Path) -> None:
    """Rows are set aside by their results, so the order depends on the run's history.

    The checkpoint has to hold it, and the running standard deviations that divide advantages.
    """
    settings = (
        "data.limit=9",
        "data.selection={mode:pass_rate,cooldown_epochs:1}",
        "data.mix={MRI:1}",
        "algo.normalize_by=modality",
    )
    whole, folder = workplace / "curriculum_whole", workplace / "curriculum_killed"
    assert launch("nowhere", workplace, f"hydra.run.dir={whole}", *settings).returncode == 0
    assert launch("backward:5", workplace, f"hydra.run.dir={folder}", *settings).returncode == -signal.SIGKILL
    resumed = launch("nowhere", workplace, f"resume={folder}", *settings)
    assert resumed.returncode == 0, resumed.output

    asked = [[line["example_id"] for line in lines(path / "rollouts.jsonl")] for path in (whole, folder)]
    assert asked[0] == asked[1]
    # without selection each epoch of nine has every row; here some are passed over, and that is
    # counted
    assert any(len(set(asked[0][at : at + 9])) < 9 for at in range(9, len(asked[0]) - 9, 9))
    shares = [[line["prompts/set_aside"] for line in lines(path / "metrics.jsonl")] for path in (whole, folder)]
    assert shares[0] == shares[1]
    assert max(shares[0]) > 0  # type: ignore[type-var]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(folder)[name]), name


@pytest.mark.slow
def test_the_run_changed_the_weights_and_resume_refuses_other_settings(workplace: Path, uninterrupted: Path) -> None:
    checkpoints = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert checkpoints == ["step-000004", "step-000006"]
    first = load_file(uninterrupted / "checkpoints" / "step-000004" / "model.safetensors")
    still = [name for name, tensor in weights(uninterrupted).items() if torch.equal(tensor, first[name])]
    assert still == []
    assert all(line["grad_norm"] > 0 for line in lines(uninterrupted / "metrics.jsonl"))  # type: ignore[operator]
    refused = launch("nowhere", workplace, f"resume={uninterrupted}", "seed=5")
    assert refused.returncode == 2
    assert "seed: 0 then, 5 now" in refused.output
