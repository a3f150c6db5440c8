"""Atomic checkpoints: written to a temporary folder in a thread, synced, renamed.

A folder `step-000050` is always complete.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rlmed.core.files.atomic import FREE_SPACE, in_the_way, rename_into_place
from rlmed.core.files.ownership import aside_of, remove, remove_leftovers
from rlmed.core.process.display import one_line
from rlmed.core.protocols import ClusterError
from rlmed.core.tracing import TIMELINE_LINES

log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the folder and the remedy."""


class Checkpoints:
    """A run's checkpoints, each written while the run goes on; at most one at a time.

    Example:
        >>> with Checkpoints(folder / "checkpoints", keep_last=2) as checkpoints:   # doctest: +SKIP
        ...     checkpoints.save(50, state, secure)
        ...     checkpoints.check()
    """

    def __init__(self, root: Path, keep_last: int) -> None:
        """Write into `root`, where all but the newest `keep_last` are removed."""
        self._root, self._keep_last = root, keep_last
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until the last checkpoint is written, also if the run ends by an error or Ctrl-C.

        Raises:
            CheckpointError: see `check`; only logged if there is another error.
        """
        if kind is None:
            self.wait()
            return
        if self._thread is not None and self._thread.is_alive():
            log.warning("waiting until a checkpoint is written; Ctrl-C gives it up, and leaves the one before")
        try:
            self.wait()
        except (CheckpointError, ClusterError) as error:
            log.error("%s", error)

    def save(self, step: int, state: dict[str, Any], secure: Callable[[Path], Callable[[], None]]) -> None:
        """Write `step-XXXXXX`; return when everything in it is secured.

        The folder appears when all of it is on the disk.

        Args:
            step: number of steps done.
            state: JSON state that the loop needs to resume.
            secure: given the new folder, secures what goes into it; returns the function that fills
                it, which another thread calls.

        Raises:
            CheckpointError: if this checkpoint, or the one before, cannot be written; earlier ones
                are untouched.
            ClusterError: if a process of the run was lost meanwhile.
        """
        self.wait()
        target = self._root / f"step-{step:06d}"
        aside = aside_of(target)
        with _refusing(target, aside):
            self._root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._root, "step-*")
            aside.mkdir()
            fill = secure(aside)
            text = json.dumps(state, indent=1)
        # a daemon: a second Ctrl-C ends the process, whatever the disk does
        self._thread = threading.Thread(target=self._finish, args=(target, aside, fill, text), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written; don't wait for one.

        Raises:
            CheckpointError: see `save`.
            ClusterError: see `save`.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Wait until the checkpoint is written, if one is in flight; see `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _finish(self, target: Path, aside: Path, fill: Callable[[], None], state: str) -> None:
        """Fill the folder and give it its name, in another thread."""
        try:
            with _refusing(target, aside):
                fill()
                (aside / STATE_FILE).write_text(state)
                for path in sorted(aside.rglob("*")):
                    _flush(path)
                _flush(aside)
                # a resumed run may write a step that it already wrote before it was killed
                rename_into_place(aside, target, may_replace=lambda: True)
                _flush(self._root)
            for old in list_checkpoints(self._root)[: -self._keep_last]:
                try:
                    _remove(old)
                except OSError as error:  # the new one is complete
                    log.warning("%s: an old checkpoint could not be removed: %s", old, error)
        except BaseException as error:  # whatever it is, the main thread raises it
            self._failure = error


@contextmanager
def _refusing(target: Path, aside: Path) -> Iterator[None]:
    """Turn an error while `target` is written into a CheckpointError, and remove `aside`."""
    try:
        yield
    except ClusterError:  # not a disk error, and its message says what to do
        remove(aside)
        raise
    except Exception as error:
        # a full disk raises OSError in Python, another type in each library, and a bare Exception
        # in tokenizers
        remove(aside)
        remedy = _remedy(target, error)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {one_line(error)}. {f'{remedy} and start' if remedy else 'Start'} "
            "again with resume=auto; earlier checkpoints are intact"
        ) from error


def _remedy(target: Path, error: Exception) -> str:
    """Return what to do before a new start; "" if that is not known, or `error` says so."""
    if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
        return FREE_SPACE
    return in_the_way(target, error)[1] if isinstance(error, OSError) else ""


def _remove(checkpoint: Path) -> None:
    """Rename, then remove: a kill midway must not leave a partial checkpoint with a valid name."""
    doomed = aside_of(checkpoint, "removed")
    checkpoint.rename(doomed)
    remove(doomed)


def starting_point(run_folder: Path, *, resume: bool, trains: bool = True) -> Path | None:
    """Return the checkpoint to resume from in `run_folder`; None for a new run.

    Args:
        run_folder: need not exist.
        resume: whether to continue a run; a new one starts where there is none.
        trains: false for an evaluation, which replaces an earlier one in its folder.

    Raises:
        ValueError: if a new run would start in another run's folder, where their checkpoints would
            overwrite each other, or a training in an evaluation's, which it would replace.
    """
    checkpoints = list_checkpoints(run_folder / "checkpoints")
    if checkpoints and not resume:
        raise ValueError(
            f"{run_folder} already contains a run ({checkpoints[-1].name}): choose another folder "
            f"(hydra.run.dir=FOLDER), or continue that run with its own command and resume={run_folder}"
        )
    if trains and not checkpoints and (evaluation := evaluation_alone(run_folder)):
        raise ValueError(
            f"{run_folder} already contains an evaluation (evaluations/{evaluation.name}) of no training "
            "run, which training would replace: choose another folder (hydra.run.dir=FOLDER)"
        )
    return checkpoints[-1] if checkpoints else None


def evaluation_alone(run_folder: Path) -> Path | None:
    """Return the last evaluation in a folder in which no training has begun; None without one.

    Evaluations of a training are in its timeline.
    """
    if any((run_folder / name).exists() for name in (TIMELINE_LINES, "metrics.jsonl")):
        return None
    return max((summary.parent for summary in run_folder.glob("evaluations/step-*/summary.json")), default=None)


def list_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted(
        (path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()),
        key=lambda path: int(path.name[5:]),
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the `state` given to `Checkpoints.save`.

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
