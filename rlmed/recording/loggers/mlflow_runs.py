"""MLflow: a tracking server, a database or, where MLflow still allows it, a folder."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from rlmed.core.config.running import LoggingConfig
from rlmed.recording.loggers.base import Beginning, LoggerState, ShownRollout, finite_values, flat, run_name

DEFAULT_PROJECT = "rlmed"
MOST_PARAMETERS = 100
"""Parameters that MLflow takes in one call."""
LONGEST_PARAMETER = 500
"""Characters that every backend of MLflow takes."""


class MlflowLogger:
    """Log metrics under the step; MLflow overwrites nothing.

    A step that a resume repeats has two points, of which the later in time is the run's.
    """

    name = "mlflow"

    def __init__(self, config: LoggingConfig) -> None:
        """Keep the settings; nothing is imported before `start`."""
        self._config = config
        self._client: Any = None
        self._run_id = ""

    def start(self, beginning: Beginning) -> None:
        """Open a run, or continue that of the run's folder."""
        # MLflow reports its use to its makers unless told not to
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        state = LoggerState(beginning.folder, self.name, resumed=beginning.resumed)
        # without a URI, MLFLOW_TRACKING_URI or MLflow's own default
        self._client = MlflowClient(tracking_uri=self._config.tracking_uri)
        kept = state.get("run_id")
        if kept is not None:
            self._client.update_run(kept, status="RUNNING")
            self._run_id = str(kept)
            return
        if not self._run_id:  # else an earlier attempt failed after this
            self._run_id = self._create(beginning)
        state.keep(run_id=self._run_id)
        self._parameters(self._run_id, beginning.settings)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log all values in one call."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(plain_name(name), value, now, step) for name, value in finite_values(values).items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def rollouts(self, step: int, shown: Sequence[ShownRollout]) -> None:
        """Log pictures and texts as artifacts, `rollouts/STEP-NUMBER`."""
        for index, rollout in enumerate(shown):
            name = f"rollouts/{step:06d}-{index}"
            if (picture := rollout.picture()) is not None:
                self._client.log_image(self._run_id, picture, artifact_file=f"{name}.png")
            self._client.log_text(self._run_id, rollout.caption(), f"{name}.txt")

    def finish(self, *, failed: bool) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")

    def _create(self, beginning: Beginning) -> str:
        project = self._config.project or os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_PROJECT)
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        name = self._config.run_name or os.environ.get("MLFLOW_RUN_NAME", run_name(beginning.folder))
        return str(self._client.create_run(experiment, run_name=name).info.run_id)

    def _parameters(self, run_id: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = iter(flat(settings).items())
        while part := list(islice(entries, MOST_PARAMETERS)):
            params = [Param(plain_name(key), str(value)[:LONGEST_PARAMETER]) for key, value in part]
            self._client.log_batch(run_id, params=params)


def plain_name(name: str) -> str:
    """Replace characters that MLflow refuses in names.

    Example:
        >>> plain_name("reward_std/CT (contrast)")
        'reward_std/CT _contrast_'
    """
    return re.sub(r"[^\w\-./ :]", "_", name)
