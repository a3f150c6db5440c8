"""trackio: a local database, or what its environment variables name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlmed.core.config.running import LoggingConfig
from rlmed.core.process.display import quiet_http_clients
from rlmed.recording.loggers.base import Beginning, LoggerState, ShownRollout, finite_values, run_name

DEFAULT_PROJECT = "rlmed"


class TrackioLogger:
    """Log metrics under the step; of two rows of a step, the later is the run's."""

    name = "trackio"

    def __init__(self, config: LoggingConfig) -> None:
        """Keep the settings; nothing is imported before `start`."""
        self._config = config
        self._run: Any = None

    def start(self, beginning: Beginning) -> None:
        """Open a run, or continue that of the run's folder."""
        import trackio

        quiet_http_clients()
        state = LoggerState(beginning.folder, self.name, resumed=beginning.resumed)
        name = state.get("name") or self._config.run_name or run_name(beginning.folder)
        # an earlier attempt may have failed after this
        self._run = self._run or trackio.init(
            project=self._config.project or DEFAULT_PROJECT,
            name=name,
            config=dict(beginning.settings),
            resume="allow" if state.get("name") else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        state.keep(name=self._run.name)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log a row."""
        self._run.log(finite_values(values), step=step)

    def rollouts(self, step: int, shown: Sequence[ShownRollout]) -> None:
        """Log pictures with captions; a question without an image is left out."""
        import trackio

        pictures = {
            f"rollouts/{index}": trackio.Image(picture, caption=entry.caption())
            for index, entry in enumerate(shown)
            if (picture := entry.picture()) is not None
        }
        if pictures:
            self._run.log(pictures, step=step)

    def finish(self, *, failed: bool) -> None:
        """Write what is left."""
        self._run.finish()
