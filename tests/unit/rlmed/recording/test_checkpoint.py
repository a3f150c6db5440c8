"""A folder with a checkpoint's name is always whole."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rlmed.core.protocols import ClusterError
from rlmed.recording.checkpoint import (
    STATE_FILE,
    CheckpointError,
    Checkpoints,
    list_checkpoints,
    read_state,
    starting_point,
)


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def save_checkpoint(
    root: Path, step: int, state: dict[str, object], fill: Callable[[Path], None], *, keep_last: int
) -> Path:
    """Save one and wait for it."""
    with Checkpoints(root, keep_last) as checkpoints:
        checkpoints.save(step, state, lambda folder: lambda: fill(folder))
    return root / f"step-{step:06d}"


class Disk:
    """Fills a checkpoint when the test allows it, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.allowed, self.error = threading.Event(), error

    def secure(self, folder: Path) -> Callable[[], None]:
        def fill() -> None:
            assert self.allowed.wait(30)
            write(folder)
            if self.error:
                raise self.error

        return fill


def test_the_run_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    disk = Disk()
    state = {"step": 1}
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, state, disk.secure)
        state["step"] = 2  # what it was when it was saved counts
        checkpoints.check()
        assert list_checkpoints(tmp_path) == []
        disk.allowed.set()
        checkpoints.wait()
        assert read_state(tmp_path / "step-000001") == {"step": 1}


def test_one_is_written_at_a_time_and_the_end_waits_for_the_last(tmp_path: Path) -> None:
    first, second = Disk(), Disk()
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, {}, first.secure)
        threading.Timer(0.2, first.allowed.set).start()

        def secure(folder: Path) -> Callable[[], None]:
            assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
            threading.Timer(0.2, second.allowed.set).start()
            return second.secure(folder)

        checkpoints.save(2, {}, secure)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001", "step-000002"]


@pytest.mark.parametrize("how", ["check", "save", "end"])
def test_a_write_that_has_failed_is_told_once_at_the_next_occasion(how: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {}, write, keep_last=1)
    disk, healthy = Disk(OSError(28, "No space left on device")), Disk()
    healthy.allowed.set()
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(2, {}, disk.secure)
    checkpoints.check()
    disk.allowed.set()
    thread = checkpoints._thread
    assert thread is not None
    occasions = {
        "check": lambda: (thread.join(), checkpoints.check()),
        "save": lambda: checkpoints.save(3, {}, healthy.secure),
        "end": lambda: checkpoints.__exit__(None),
    }
    with pytest.raises(CheckpointError, match=r"/step-000002 .*No space left on device.* resume=auto\b"):
        occasions[how]()
    checkpoints.check()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_ends_by_another_error_or_ctrl_c_still_gets_its_checkpoint(
    fails: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(OSError(28, "No space left on device") if fails else None)

    def interrupted() -> None:
        with Checkpoints(tmp_path, 2) as checkpoints:
            checkpoints.save(1, {}, disk.secure)
            threading.Timer(0.2, disk.allowed.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(list_checkpoints(tmp_path)) == (not fails)
    assert "waiting until a checkpoint is written" in caplog.text
    assert ("No space left" in caplog.text) == fails


def test_a_kill_while_one_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from rlmed.recording.checkpoint import Checkpoints

def secure(folder):
    def fill():
        (folder / "model.safetensors").write_bytes(b"half")
        if folder.name.startswith(".step-000002"):
            os.kill(os.getpid(), signal.SIGKILL)
    return fill

with Checkpoints(Path(sys.argv[1]), 2) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, {"step": step}, secure)
"""
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (found,) = list_checkpoints(tmp_path)
    assert read_state(found) == {"step": 1}
    assert len(os.listdir(tmp_path)) == 2  # half of the second is there, under another name
    save_checkpoint(tmp_path, 2, {"step": 2}, write, keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000002"]


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


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_is_refused_where_an_evaluation_lives(resume: bool, tmp_path: Path) -> None:
    (evaluation := tmp_path / "evaluations" / "step-000000").mkdir(parents=True)
    assert starting_point(tmp_path, resume=resume) is None  # one that was given up
    (evaluation / "summary.json").write_text("{}")
    message = rf"^{re.escape(str(tmp_path))} .*an evaluation \(evaluations/step-000000\).*hydra\.run\.dir=FOLDER"
    with pytest.raises(ValueError, match=message):
        starting_point(tmp_path, resume=resume)
    assert starting_point(tmp_path, resume=resume, trains=False) is None
    (tmp_path / "timeline.jsonl").touch()  # of a training that ended before its first checkpoint
    assert starting_point(tmp_path, resume=resume) is None


FULL, QUOTA = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, FULL), "device. Free some space and start again with"),
        (OSError(errno.EDQUOT, QUOTA), "Free some space and start"),
        (RuntimeError(f"in a library: {FULL} (os error 28)"), "Free some space and start"),
        (OSError(errno.EACCES, "Permission denied"), "denied. Make its folder writable and start"),
        (OSError(errno.EFBIG, "File too large"), "(ulimit -f) and start"),
        (OSError(errno.EIO, "Input/output error"), "Check the disk and start"),
        (RuntimeError("PytorchStreamWriter failed"), "failed. Start again with"),
        (
            MemoryError(),
            "out of memory (in Python): close other programs, raise the limit, or reduce memory use. Start",
        ),
    ],
)
def test_a_failed_write_names_its_own_cure_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, error: Exception, said: str
) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise error

    save_checkpoint(tmp_path, 5, {}, write, keep_last=1)
    with pytest.raises(CheckpointError, match=r"step-000006 could not be written.*resume=auto") as caught:
        save_checkpoint(tmp_path, 6, {}, fail, keep_last=1)
    assert said in str(caught.value)
    assert ("Free some space" in said) == ("Free some space" in str(caught.value))
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
