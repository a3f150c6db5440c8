"""What a logger is: a place besides the run's folder where its curves are shown."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlmed.core.files.atomic import replace_text
from rlmed.core.types import ScoredGroup
from rlmed.data.images import BadImageError, load_image

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

FOLDER = "loggers"
"""In a run's folder: what each logger needs to continue its run."""
MOST_CHARACTERS = 2000
"""Most characters of a completion to send beside a picture."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a logger is told before anything else."""

    folder: Path
    """The run's folder."""
    settings: Mapping[str, Any]
    """The run's configuration, nested; empty if unknown."""
    resumed: bool
    """Whether the run continues from a checkpoint, so that steps may come again."""


@dataclass(frozen=True, slots=True)
class ShownRollout:
    """One group for people to look at: its picture, question, best and worst completion."""

    image: Path | None
    """The first image; None if the question has none."""
    question: str
    best: str
    best_reward: float
    worst: str
    worst_reward: float

    def picture(self) -> Image | None:
        """Return the picture; None if there is none, or its file cannot be read any more."""
        if self.image is None:
            return None
        try:
            return load_image(self.image)
        except (BadImageError, OSError) as error:
            log.warning("a rollout is logged without its picture: %s", error)
            return None

    def caption(self) -> str:
        """Return everything but the picture as plain text."""
        return (
            f"{self.question}\n\nbest ({self.best_reward:g}): {_cut(self.best)}\n\n"
            f"worst ({self.worst_reward:g}): {_cut(self.worst)}"
        )


class Logger(Protocol):
    """A place for curves and pictures; every method may raise, and is called from one thread.

    `rlmed.recording.loggers.guard` keeps errors and waiting away from the run.
    """

    name: str
    """As in the setting `loggers`."""

    def start(self, beginning: Beginning) -> None:
        """Open a run, or continue the one that the folder names; called again if it raised."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite values after `step` steps; accuracies are named "accuracy/FILE"."""

    def rollouts(self, step: int, shown: Sequence[ShownRollout]) -> None:
        """Log rollouts of a step."""

    def finish(self, *, failed: bool) -> None:
        """Write what is left and close."""


class LoggerState:
    """What a logger keeps in `loggers/NAME.json` of a run's folder, to continue after a resume.

    Example:
        >>> state = LoggerState(Path("run"), "mlflow", resumed=False)
        >>> state.keep(run_id="4f1")                                                 # doctest: +SKIP
        >>> LoggerState(Path("run"), "mlflow", resumed=True).get("run_id")           # doctest: +SKIP
        '4f1'
    """

    def __init__(self, folder: Path, name: str, *, resumed: bool) -> None:
        """Read the file of a resumed run; a new run starts without."""
        self._path = folder / FOLDER / f"{name}.json"
        found = resumed and self._path.is_file()
        self._values: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8")) if found else {}

    def get(self, key: str) -> Any:
        """Return a value; None if there is none."""
        return self._values.get(key)

    def keep(self, **values: Any) -> None:
        """Add values and write the file."""
        self._values |= values
        replace_text(self._path, json.dumps(self._values) + "\n")


def finite_values(values: Mapping[str, float]) -> dict[str, float]:
    """Return the finite values as Python floats: metrics.jsonl has null for the others."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def show(scored: Sequence[ScoredGroup], count: int) -> list[ShownRollout]:
    """Return the first `count` groups with two finite rewards and none missing: best and worst."""
    shown: list[ShownRollout] = []
    for group in scored:
        rewards = [(float(value), index) for index, value in enumerate(group.rewards) if math.isfinite(value)]
        if len(shown) == count:
            break
        if len(rewards) < 2 or not group.rewarded:
            continue
        (low, worst), (high, best) = min(rewards), max(rewards)
        texts = [completion.text for completion in group.rollout.completions]
        example = group.rollout.prompt.example
        shown.append(ShownRollout(example.image, example.question, texts[best], high, texts[worst], low))
    return shown


def run_name(folder: Path) -> str:
    """Return the name that a run has elsewhere: that of its folder and the folder's parent."""
    return f"{folder.parent.name}/{folder.name}"


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys."""
    values: dict[str, Any] = {}
    for key, entry in settings.items():
        values |= flat(entry, f"{prefix}{key}.") if isinstance(entry, Mapping) else {f"{prefix}{key}": entry}
    return values


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
