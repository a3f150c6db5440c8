"""The models that can be asked: given folders, checkpoints of run folders, the embedded one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlmed.models.tiny.toy import EMBEDDED

EMBEDDED_MODEL = f"{EMBEDDED}tiny_base"
_STEP = re.compile(r"step-\d{6,}")
_FILES = ("config.json", "adapter_config.json")
MOST = 500
"""Checkpoints listed."""


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model that can be asked.

    Example:
        ModelChoice(path="outputs/run/DATE/checkpoints/step-000300", label="run/DATE, step 300")
    """

    path: str
    label: str

    @property
    def key(self) -> str:
        """What a page calls it, so that only listed models can be asked."""
        return hashlib.sha256(self.path.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def model_choices(runs: Mapping[str, Path], given: Sequence[str] = ()) -> list[ModelChoice]:
    """Return models: those given, checkpoints of runs, newest first, and the embedded one.

    Args:
        runs: folder of the checkpoints of each run by name; may be missing.
        given: folders or names of other models.
    """
    found: list[tuple[float, ModelChoice]] = []
    for name, checkpoints in runs.items():
        for folder in checkpoints_in(checkpoints):
            label = f"{name}, step {int(folder.name.removeprefix('step-'))}"
            with suppress(OSError):  # removed by the run meanwhile
                found.append((folder.stat().st_mtime, ModelChoice(str(folder), label)))
    found.sort(key=lambda one: -one[0])
    return [
        *(ModelChoice(path, path) for path in given),
        *(choice for _, choice in found[:MOST]),
        ModelChoice(EMBEDDED_MODEL, "embedded model (knows generated images only)"),
    ]


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that can be loaded; links are not followed."""
    return [
        path
        for path in sorted(folder.glob("step-*"))
        if _STEP.fullmatch(path.name) and not path.is_symlink() and any((path / name).is_file() for name in _FILES)
    ]
