"""Build the loggers that the settings name, and say before a run what they lack."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlmed.core.config.checks import ConfigError
from rlmed.core.config.running import LoggingConfig
from rlmed.core.types import ScoredGroup
from rlmed.recording.loggers.base import Beginning, Logger, show
from rlmed.recording.loggers.guard import GuardedLogger
from rlmed.recording.loggers.mlflow_runs import MlflowLogger
from rlmed.recording.loggers.tensorboard import TensorBoardLogger
from rlmed.recording.loggers.trackio_runs import TrackioLogger
from rlmed.recording.loggers.weights_and_biases import WandbLogger

log = logging.getLogger(__name__)

MAKERS: dict[str, Callable[[LoggingConfig], Logger]] = {
    "tensorboard": lambda config: TensorBoardLogger(),
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "trackio": TrackioLogger,
}
"""By name in the setting `loggers`: the package's, and the extra's (TensorBoard needs none)."""
FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
"""Without it, MLflow refuses a folder."""
LOCAL_STORES = ("", "file", "sqlite")
"""Schemes of MLflow's stores that lie in files."""


class Loggers:
    """All loggers of a run, each behind its guard; opened by the first thing to log."""

    def __init__(
        self,
        folder: Path,
        loggers: Sequence[GuardedLogger],
        *,
        settings: Mapping[str, Any] | None = None,
        rollouts_every: int = 0,
        rollouts: int = 0,
    ) -> None:
        """Keep what the loggers are told when they begin.

        Args:
            folder: the run's folder.
            loggers: not started yet.
            settings: the run's configuration.
            rollouts_every: steps between rollouts to show; 0 shows none.
            rollouts: how many groups to show then.
        """
        self._folder, self._settings, self._loggers = folder, settings or {}, loggers
        self._rollouts_every, self._rollouts = rollouts_every, rollouts
        self._started = False
        self.resumed = False
        """Set before the first call if the run continues from a checkpoint."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log values after `step` steps."""
        self._start()
        values = dict(values)
        for logger in self._loggers:
            logger.scalars(step, values)

    def rollouts(self, step: int, scored: Sequence[ScoredGroup]) -> None:
        """Log a few groups, if it is their turn."""
        if self._rollouts_every and step % self._rollouts_every == 0 and (shown := show(scored, self._rollouts)):
            self._start()
            for logger in self._loggers:
                logger.rollouts(step, shown)

    def finish(self, *, failed: bool = False) -> None:
        """Close all; a second call does nothing."""
        if self._started:
            self._started = False
            for logger in self._loggers:
                logger.begin_finish(failed=failed)
            for logger in self._loggers:
                logger.wait()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            for logger in self._loggers:
                logger.start(Beginning(self._folder, self._settings, self.resumed))


def build_loggers(
    folder: Path, names: Sequence[str], config: LoggingConfig, settings: Mapping[str, Any], *, samples: bool
) -> Loggers:
    """Return the loggers of a run.

    Args:
        folder: the run's folder.
        names: keys of `MAKERS`.
        config: their settings.
        settings: the whole configuration, nested, to show.
        samples: whether the run has rollouts.

    Raises:
        ConfigError: see `check_loggers`.
    """
    check_loggers(names, config)
    every = config.rollouts_every if samples else 0
    return Loggers(
        folder,
        [GuardedLogger(MAKERS[name](config)) for name in dict.fromkeys(names)],
        settings=settings,
        rollouts_every=every,
        rollouts=config.rollouts if every else 0,
    )


def check_loggers(names: Sequence[str], config: LoggingConfig) -> None:
    """Check what can be known before a run.

    Raises:
        ConfigError: for a package that is not installed, for `offline` or `tracking_uri` where no
            logger reads it, and for what MLflow or W&B would refuse.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            locked = "" if name == "trackio" else "-c requirements.lock "
            raise ConfigError(
                f"loggers=[{name}] needs the package {name}: pip install {locked}-e '.[{name}]' in rlmed's checkout, or "
                f"leave {name} out"
            )
    if config.offline and "wandb" not in names and {*names} - {"tensorboard"}:
        raise ConfigError(
            f"logging.offline=true is for wandb alone, and loggers={list(names)} lacks it: leave it out, and name a "
            "database on this machine for mlflow, such as logging.tracking_uri=sqlite:///mlflow.db"
        )
    if config.tracking_uri is not None and "mlflow" not in names and {*names} - {"tensorboard"}:
        raise ConfigError(
            f"logging.tracking_uri={_without_password(config.tracking_uri)} is for mlflow alone, and loggers={list(names)} "
            "lacks it: leave it out, or add mlflow"
        )
    if "mlflow" in names:
        _check_mlflow(config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), offline=config.offline)


def _check_mlflow(uri: str | None, *, offline: bool) -> None:
    if offline and uri is not None and (urlsplit(uri).scheme not in LOCAL_STORES or uri.startswith("databricks")):
        log.warning("logging.offline=true is for wandb alone: mlflow sends this run to %s", _without_password(uri))
    if uri is None or uri.startswith("databricks"):
        return
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file") and os.environ.get(FILE_STORE, "").lower() not in ("true", "1"):
        raise ConfigError(
            f"logging.tracking_uri={uri} is a folder, which MLflow no longer writes unasked: use sqlite:///mlflow.db, or set "
            f"the environment variable {FILE_STORE}=true"
        )


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return uri.replace(f"{parts.netloc.rpartition('@')[0]}@", "") if "@" in parts.netloc else uri
