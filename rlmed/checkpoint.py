"""Checkpoints: written aside, flushed to disk, renamed; so a folder named `step-000050` is always whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    """
    target = root / f"step-{step:06d}"
    aside = root / f".{target.name}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".step-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        aside.mkdir()
        write(aside)
        (aside / STATE_FILE).write_text(json.dumps(state, indent=1))
        for path in sorted(aside.rglob("*")):
            _flush(path)
        _flush(aside)
        if target.exists():  # a resumed run writes the step that it had written before it was killed
            _remove(target)
        aside.rename(target)
        _flush(root)
    except Exception as error:
        # a full disk is an OSError from Python, another type from each library, and from tokenizers a bare Exception
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {error}. Free some space (or make the folder writable) and start "
            "again with resume=auto; earlier checkpoints are whole"
        ) from error
    for old in list_checkpoints(root)[:-keep_last]:
        _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    """Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a good name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def starting_point(run_folder: Path, *, resume: bool) -> Path | None:
    """The checkpoint that a run in `run_folder` goes on from; None for a new run.

    Raises:
        ValueError: when a new run was asked for in the folder of another: their checkpoints would replace each other.
    """
    checkpoints = list_checkpoints(run_folder / "checkpoints")
    if checkpoints and not resume:
        raise ValueError(
            f"{run_folder} holds a run already ({checkpoints[-1].name}): go on with it by resume={run_folder}, or give the "
            "new run a folder of its own (hydra.run.dir=FOLDER)"
        )
    return checkpoints[-1] if checkpoints else None


def list_checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: int(path.name[5:]))


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
