"""A folder with a checkpoint's name is always whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlmed.core.protocols import ClusterError
from rlmed.recording.checkpoint import (
    STATE_FILE,
    CheckpointError,
    list_checkpoints,
    read_state,
    save_checkpoint,
    starting_point,
)


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def test_save_and_read(tmp_path: Path) -> None:
    target = save_checkpoint(tmp_path, 7, {"cursor": 56}, write, keep_last=2)
    assert target == tmp_path / "step-000007"
    assert sorted(path.name for path in target.iterdir()) == ["model.safetensors", STATE_FILE]
    assert read_state(target) == {"cursor": 56}


def test_keep_last(tmp_path: Path) -> None:
    for step in (5, 10, 1_000_000, 15):
        save_checkpoint(tmp_path, step, {}, write, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000015", "step-1000000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000015", "step-1000000"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"try": 1}, write, keep_last=2)
    assert read_state(save_checkpoint(tmp_path, 5, {"try": 2}, write, keep_last=2)) == {"try": 2}


def test_a_kill_while_an_old_step_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 4, {}, write, keep_last=2)
    save_checkpoint(tmp_path, 5, {}, write, keep_last=2)

    def killed(path: Path, **_: object) -> None:
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("rlmed.core.files.ownership.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 5, {}, write, keep_last=2)
    for checkpoint in list_checkpoints(tmp_path):
        assert (checkpoint / "model.safetensors").is_file()


def test_a_new_run_is_refused_where_another_lives(tmp_path: Path) -> None:
    assert starting_point(tmp_path, resume=False) is None
    saved = save_checkpoint(tmp_path / "checkpoints", 5, {}, write, keep_last=2)
    assert starting_point(tmp_path, resume=True) == saved
    with pytest.raises(ValueError, match=r"already contains a run \(step-000005\).*resume="):
        starting_point(tmp_path, resume=False)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path: Path, error: Exception) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise error

    save_checkpoint(tmp_path, 5, {}, write, keep_last=1)
    with pytest.raises(CheckpointError, match=r"step-000006 could not be written.*resume=auto"):
        save_checkpoint(tmp_path, 6, {}, fail, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_a_rank_that_is_lost_while_it_saves_is_no_trouble_of_the_disk(tmp_path: Path) -> None:
    def lose(folder: Path) -> None:
        write(folder)
        raise ClusterError("learner rank 1 was lost while it should save")

    with pytest.raises(ClusterError, match="rank 1 was lost"):
        save_checkpoint(tmp_path, 6, {}, lose, keep_last=1)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_no_checkpoints_and_go(tmp_path: Path) -> None:
    (tmp_path / ".step-000009.partial").mkdir(parents=True)
    (tmp_path / ".step-000001.removed").mkdir()
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, 10, {}, write, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000001").write_text("")
    assert list_checkpoints(tmp_path) == []


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(CheckpointError, match=r"step-000001 .*File exists"):
        save_checkpoint(tmp_path / "checkpoints", 1, {}, write, keep_last=1)
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_read_state_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read_state(tmp_path)
    (tmp_path / STATE_FILE).write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read_state(tmp_path)
