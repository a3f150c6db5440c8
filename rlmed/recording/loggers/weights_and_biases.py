"""W&B: online, or offline in the run's folder for a later `wandb sync`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from rlmed.core.config.running import LoggingConfig
from rlmed.core.files.jsonlines import read_json_lines
from rlmed.recording.loggers.base import Beginning, LoggerState, ShownRollout, finite_values, run_name

DEFAULT_PROJECT = "rlmed"
METRICS = "metrics.jsonl"
"""The run's own record, from which lost rows are logged again."""
LOGIN_S = 30
"""How long W&B may ask for an API key in the terminal."""


class WandbLogger:
    """Log rows with the field `step`, the x axis of all curves.

    W&B's own `_step` only grows, over a resume as well, so no row is refused: a step that a resume
    repeats has a second row, of which the later is the run's. A killed process loses what W&B has
    not yet written of an offline run, up to all of it: a resumed run logs its past again.
    """

    name = "wandb"

    def __init__(self, config: LoggingConfig) -> None:
        """Keep the settings; nothing is imported before `start`."""
        self._config = config
        self._run: Any = None
        self._id = secrets.token_hex(4)
        self._state: LoggerState | None = None
        self._rows = 0

    def start(self, beginning: Beginning) -> None:
        """Open a run, or continue that of the run's folder."""
        # else W&B reports its errors to its makers
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        state = LoggerState(beginning.folder, self.name, resumed=beginning.resumed)
        # of all attempts: a first one may have failed after it had made the run
        name, folder = state.get("id") or self._id, beginning.folder
        # an earlier attempt may have failed after this
        self._run = self._run or wandb.init(
            project=self._config.project or os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
            name=self._config.run_name or os.environ.get("WANDB_NAME", run_name(folder)),
            id=name,
            resume="allow",
            dir=str(folder),
            mode="offline" if self._config.offline else None,
            config=dict(beginning.settings),
            # nothing but what is logged here: no console, code, git remote, packages, machine load
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False,
                x_disable_meta=True, x_save_requirements=False, x_disable_stats=True, login_timeout=LOGIN_S,
            ),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")
        self._rows = int(state.get("rows") or 0)
        killed = bool(state.get("open"))
        state.keep(id=name, open=True)
        self._state = state
        if killed and self._run.offline:
            for line in read_json_lines(folder / METRICS):
                self._row({key: value for key, value in line.items() if value is not None})
            for step, values in (state.get("accuracies") or {}).items():
                self._row({"step": int(step), **values})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row."""
        finite = finite_values(values)
        self._row({"step": step, **finite})
        if accuracies := {name: value for name, value in finite.items() if name.startswith("accuracy/")}:
            assert self._state is not None
            self._state.keep(accuracies={**(self._state.get("accuracies") or {}), str(step): accuracies})

    def rollouts(self, step: int, shown: Sequence[ShownRollout]) -> None:
        """Log a row of pictures with captions; a question without an image has its text alone."""
        import wandb

        read = [(entry.picture(), entry.caption()) for entry in shown]
        pictures = [wandb.Image(picture, caption=caption) for picture, caption in read if picture is not None]
        texts = [[caption] for picture, caption in read if picture is None]
        row: dict[str, Any] = {"step": step}
        if pictures:
            row["rollouts/images"] = pictures
        if texts:
            row["rollouts/texts"] = wandb.Table(columns=["rollout"], data=texts)
        self._row(row)

    def finish(self, *, failed: bool) -> None:
        """Upload what is left and end the run."""
        self._run.finish(exit_code=int(failed))
        if self._state is not None:
            self._state.keep(open=False)

    def _row(self, row: Mapping[str, Any]) -> None:
        assert self._state is not None
        # first the count: a row with the number of an earlier one would be merged into that
        self._state.keep(rows=self._rows + 1)
        self._run.log(dict(row), step=self._rows)
        self._rows += 1
