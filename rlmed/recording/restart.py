"""Remove what an earlier attempt at a run recorded and its next one does not go on from."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from rlmed.core.files.ownership import remove
from rlmed.core.tracing import CHROME_TRACE, TIMELINE_LINES
from rlmed.recording.loggers.base import FOLDER
from rlmed.recording.loggers.tensorboard import TENSORBOARD_FOLDER
from rlmed.recording.recorder import BAD_STEPS_FOLDER, BATCHES_FOLDER, REFUSED_FILE

log = logging.getLogger(__name__)

EVALUATIONS_FOLDER = "evaluations"
ALL = (
    EVALUATIONS_FOLDER,
    BATCHES_FOLDER,
    BAD_STEPS_FOLDER,
    TENSORBOARD_FOLDER,
    FOLDER,
    CHROME_TRACE,
    REFUSED_FILE,
    "report.html",
)
"""What a run writes beside the files that `RunRecorder.truncate` empties; W&B's stay for a sync."""
_STEP = re.compile(r"(?:step-)?(\d{6,})(?:\.npz)?")


def remove_earlier_attempt(folder: Path) -> None:
    """Remove the records of an attempt that saved no checkpoint: the next may have other settings.

    Results of slow rewards stay: they do not depend on the attempt. A folder in which no run has
    begun to train is left alone.
    """
    found = [folder / name for name in ALL if (folder / name).exists()]
    if found and (folder / TIMELINE_LINES).exists():
        log.info("%s: starting anew, without %s of an earlier attempt", folder, ", ".join(path.name for path in found))
        for path in found:
            remove(path)


def remove_later_records(folder: Path, done: int) -> None:
    """Remove evaluations and batches of steps after `done`, from which the run goes on."""
    for name in (EVALUATIONS_FOLDER, BATCHES_FOLDER):
        for path in (folder / name).glob("*"):
            if (step := _STEP.fullmatch(path.name)) and int(step[1]) > done:
                remove(path)
