"""Find the folder of a run: a new one, the one to resume, and whether it can be written."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from rewards.cache import CACHE_FILE
from rlmed.core.files.atomic import refusal
from rlmed.recording.checkpoint import evaluation_alone, list_checkpoints
from rlmed.recording.inputs import CONFIG_FILE

PROBE = b"." * 2**16
"""Test data for `check_writable`; more than the few bytes that a full disk may still accept."""


def newest_run(folder: Path) -> Path | None:
    """Return the run that `resume=auto` resumes: `folder`'s sibling that saved something last.

    That is a checkpoint, or, before the first one, results of slow rewards, which are not asked for
    again. Says so on stdout if the run has no checkpoint, and names each run that began later but
    saved nothing.
    """
    saved, begun, at_first = {}, {}, set()
    for path in folder.parent.glob("*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            if checkpoints := list_checkpoints(path / "checkpoints"):
                saved[path] = checkpoints[-1].stat().st_mtime
            elif (path / CONFIG_FILE).exists() and not evaluation_alone(path):
                begun[path] = (path / CONFIG_FILE).stat().st_mtime
                if (path / CACHE_FILE).exists():
                    saved[path] = (path / CACHE_FILE).stat().st_mtime
                    at_first.add(path)
    if not saved:
        return None
    newest = max(saved, key=saved.__getitem__)
    for path in sorted(begun.keys() - at_first):
        if begun[path] > saved[newest]:
            sys.stdout.write(f"resume=auto: {path} ended before its first checkpoint, so {newest} is resumed\n")
    if newest in at_first:
        earlier = max(saved.keys() - at_first, key=saved.__getitem__, default=None)
        other = f"; to continue {earlier.name} instead: resume={earlier}" if earlier else ""
        sys.stdout.write(
            f"resume=auto: {newest} ended before its first checkpoint: starting it from step 1, with the rewards in "
            f"{CACHE_FILE}{other}\n"
        )
    return newest


def report_fresh_start(folder: Path) -> None:
    """Say that `resume=auto` has found no checkpoint in `folder`."""
    sys.stdout.write(f"resume=auto: nothing to resume in {folder}, starting from step 1\n")
    sys.stdout.flush()


def new_folder(wanted: Path) -> Path:
    """Create the folder, with a number appended to its name if it already exists."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return folder


def check_writable(folder: Path) -> None:
    """Check that `folder` is writable, creating it if missing.

    Hydra writes there before the program's own code runs, and its errors would be tracebacks.

    Raises:
        RecordError: if it is not writable; names the folder and what to do.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(PROBE)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise refusal(folder, error, advice="try again, or choose another with hydra.run.dir=FOLDER") from error
