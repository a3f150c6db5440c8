"""What the writers for evaluation kits share."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from rlmed.core.files.atomic import replace_text
from rlmed.evaluation.records import EvalRow


class Kit(ABC):
    """Writes answers in the form that an evaluation kit scores."""

    name: ClassVar[str]
    """In `eval.predictions`."""
    title: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    """Tasks whose rows it takes."""

    @abstractmethod
    def write(self, folder: Path, file: str, model: str, rows: Sequence[EvalRow]) -> list[Path]:
        """Write a file's rows, each file atomically; return the paths that the kit reads.

        Args:
            folder: the kit's own.
            file: name of the evaluated file.
            model: name of the model.
            rows: all unchanged rows of the file in its order, also those of other tasks.

        Raises:
            OSError: if a write fails.
        """

    def taken(self, rows: Sequence[EvalRow]) -> list[tuple[int, EvalRow]]:
        """Return the rows of the kit's tasks, each with its place in the file, from 0."""
        return [(place, row) for place, row in enumerate(rows) if row.task in self.tasks]

    def by_task(self, rows: Sequence[EvalRow]) -> dict[str, list[tuple[int, EvalRow]]]:
        """Return `taken`, by task."""
        parts: dict[str, list[tuple[int, EvalRow]]] = {}
        for place, row in self.taken(rows):
            parts.setdefault(row.task, []).append((place, row))
        return parts


def write_json(path: Path, content: Any) -> Path:
    """Write JSON as UTF-8, indented by four as the kits do, atomically."""
    return replace_text(path, json.dumps(content, indent=4, ensure_ascii=False) + "\n")
