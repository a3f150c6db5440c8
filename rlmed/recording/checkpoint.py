"""Atomic checkpoints: written to a temporary folder, synced, renamed.

A folder `step-000050` is always complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlmed.core.files.atomic import rename_into_place
from rlmed.core.files.ownership import aside_of, remove, remove_leftovers
from rlmed.core.protocols import ClusterError

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the folder and the remedy."""


def save_checkpoint(
    root: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], *, keep_last: int
) -> Path:
    """Write `root/step-XXXXXX` and remove all but the newest `keep_last`.

    Args:
        root: folder of the run's checkpoints.
        step: number of steps done.
        state: JSON state that the loop needs to resume.
        write: fills the new folder.
        keep_last: number of checkpoints kept.

    Raises:
        CheckpointError: if writing fails; earlier checkpoints are untouched.
        ClusterError: raised by `write` if a process of the run was lost meanwhile.
    """
    target = root / f"step-{step:06d}"
    aside = aside_of(target)
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root, "step-*")
        aside.mkdir()
        write(aside)
        (aside / STATE_FILE).write_text(json.dumps(state, indent=1))
        for path in sorted(aside.rglob("*")):
            _flush(path)
        _flush(aside)
        # a resumed run may write a step that it already wrote before it was killed
        rename_into_place(aside, target, may_replace=lambda: True)
        _flush(root)
    except ClusterError:  # not a disk error, and its message says what to do
        remove(aside)
        raise
    except Exception as error:
        # a full disk raises OSError in Python, another type in each library, and a bare Exception
        # in tokenizers
        remove(aside)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {error}. Free some space (or make the folder writable) and start "
            "again with resume=auto; earlier checkpoints are intact"
        ) from error
    for old in list_checkpoints(root)[:-keep_last]:
        _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    """Rename, then remove: a kill midway must not leave a partial checkpoint with a valid name."""
    doomed = aside_of(checkpoint, "removed")
    checkpoint.rename(doomed)
    remove(doomed)


def starting_point(run_folder: Path, *, resume: bool) -> Path | None:
    """Return the checkpoint to resume from in `run_folder`; None for a new run.

    Raises:
        ValueError: if a new run would start in another run's folder: their checkpoints would
            overwrite each other.
    """
    checkpoints = list_checkpoints(run_folder / "checkpoints")
    if checkpoints and not resume:
        raise ValueError(
            f"{run_folder} already contains a run ({checkpoints[-1].name}): choose another folder "
            f"(hydra.run.dir=FOLDER), or continue that run with its own command and resume={run_folder}"
        )
    return checkpoints[-1] if checkpoints else None


def list_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted(
        (path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()),
        key=lambda path: int(path.name[5:]),
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the `state` that `save_checkpoint` wrote.

    Raises:
        CheckpointError: if the folder is not a run's checkpoint.
    """
    try:
        return dict(json.loads((checkpoint / STATE_FILE).read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is not a checkpoint to resume from: {STATE_FILE}: {error}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
