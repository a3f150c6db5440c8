"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlmed.recording.loggers.base import Beginning, ShownRollout, finite_values

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoardLogger:
    """Write `tensorboard/`; steps that a resume repeats hide what was there."""

    name = "tensorboard"

    def __init__(self) -> None:
        """Open nothing yet."""
        self._folder: Path | None = None
        self._board: SummaryWriter | None = None

    def start(self, beginning: Beginning) -> None:
        """Note the folder: the first step decides what is hidden."""
        self._folder = beginning.folder / TENSORBOARD_FOLDER

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        board = self._open(step)
        for name, value in finite_values(values).items():
            board.add_scalar(name, value, step)

    def rollouts(self, step: int, shown: Sequence[ShownRollout]) -> None:
        """Add pictures and texts."""
        board = self._open(step)
        for index, rollout in enumerate(shown):
            if (picture := rollout.picture()) is not None:
                board.add_image(f"rollouts/{index}", np.asarray(picture), step, dataformats="HWC")
            # indented: Markdown shows it as it is
            board.add_text(f"rollouts/{index}", "    " + rollout.caption().replace("\n", "\n    "), step)

    def finish(self, *, failed: bool) -> None:
        """Close the event file."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _open(self, step: int) -> SummaryWriter:
        if self._board is None:
            # takes a second to import; commands that record nothing should not wait for it
            from torch.utils.tensorboard import SummaryWriter

            assert self._folder is not None
            # with purge_step, TensorBoard hides what an earlier process logged after the resumed
            # checkpoint
            self._board = SummaryWriter(str(self._folder), purge_step=step if self._folder.exists() else None)
        return self._board
