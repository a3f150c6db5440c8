"""What an earlier attempt recorded is not mixed with what the next one records."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlmed.recording.restart import remove_earlier_attempt, remove_later_records

RECORDS = (
    "evaluations/step-000000/summary.json",
    "batches/000001.npz",
    "bad_steps/001.npz",
    "tensorboard/events",
    "loggers/mlflow.json",
    "timeline.json",
    "report.html",
)
KEPT = ("rewards.jsonl", "config.yaml", "timeline.jsonl", "wandb/offline-run-1/run.wandb", "own/notes.txt")


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_an_attempt_that_saved_nothing_leaves_its_rewards_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write(tmp_path, *RECORDS, *KEPT)
    remove_earlier_attempt(tmp_path)
    assert files_in(tmp_path) == {*KEPT}
    assert "without evaluations, batches" in caplog.text
    caplog.clear()
    remove_earlier_attempt(tmp_path)
    assert caplog.messages == []


def test_a_folder_of_evaluations_alone_is_no_attempt(tmp_path: Path) -> None:
    write(tmp_path, RECORDS[0], "config.yaml")
    remove_earlier_attempt(tmp_path)
    assert files_in(tmp_path) == {RECORDS[0], "config.yaml"}


def test_what_was_recorded_after_a_checkpoint_goes_when_the_run_goes_on_from_it(tmp_path: Path) -> None:
    names = [f"evaluations/step-{step:06d}/summary.json" for step in (0, 4, 5)]
    names += [f"batches/{step:06d}.npz" for step in (4, 6)]
    write(tmp_path, *names, "evaluations/comparison-9/x.json")
    remove_later_records(tmp_path, 4)
    assert files_in(tmp_path) == {names[0], names[1], names[3], "evaluations/comparison-9/x.json"}
