"""Checkpoints: written aside, flushed to disk, renamed; so a folder named `step-000050` is always whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlmed.core.files import rename_into_place
from rlmed.core.ownership import aside_of, remove, remove_leftovers
from rlmed.core.protocols import ClusterError

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the folder and the cure."""


def save_checkpoint(
    root: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], *, keep_last: int
) -> Path:
    """Write `root/step-XXXXXX` and remove all but the newest `keep_last`.

    Args:
        root: folder of the run's checkpoints.
        step: steps done.
        state: what the loop needs to go on, as JSON.
        write: fills the new folder.
        keep_last: number of checkpoints kept.

    Raises:
        CheckpointError: when the disk refuses; earlier checkpoints are untouched.
        ClusterError: as `write` raised it, when a process of the run was lost meanwhile.
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
        # a resumed run may write the step that it had written before it was killed
        rename_into_place(aside, target, may_replace=lambda: True)
        _flush(root)
    except ClusterError:  # the disk is well, and what was lost knows its cure
        remove(aside)
        raise
    except Exception as error:
        # a full disk is an OSError from Python, another type from each library, and from tokenizers a bare Exception
        remove(aside)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {error}. Free some space (or make the folder writable) and start "
            "again with resume=auto; earlier checkpoints are whole"
        ) from error
    for old in list_checkpoints(root)[:-keep_last]:
        _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    """Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a good name."""
    doomed = aside_of(checkpoint, "removed")
    checkpoint.rename(doomed)
    remove(doomed)


def starting_point(run_folder: Path, *, resume: bool) -> Path | None:
    """The checkpoint that a run in `run_folder` goes on from; None for a new run.

    Raises:
        ValueError: when a new run was asked for in the folder of another: their checkpoints would replace each other.
    """
    checkpoints = list_checkpoints(run_folder / "checkpoints")
    if checkpoints and not resume:
        raise ValueError(
            f"{run_folder} holds a run already ({checkpoints[-1].name}): give the new one a folder of its own "
            f"(hydra.run.dir=FOLDER), or go on with that run by its own command and resume={run_folder}"
        )
    return checkpoints[-1] if checkpoints else None


def list_checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted(
        (path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()),
        key=lambda path: int(path.name[5:]),
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`.

    Raises:
        CheckpointError: when the folder is no checkpoint of a run.
    """
    try:
        return dict(json.loads((checkpoint / STATE_FILE).read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is no checkpoint to resume from: {STATE_FILE}: {error}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
