"""Find the user's tasks of a recorded run again, for commands that read its folder."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmed.tasks.registry import settle_tasks

FLAG = "--extra-tasks"


def settle_run_tasks(
    folder: Path, config: Mapping[Any, Any], given: Sequence[str], synonyms: str | None = None
) -> str | None:
    """Add the tasks given on the command line, or else those that a run's `data.extra_tasks` names.

    A run's own are looked for where all modules are; a module that lies in the run's folder is not
    loaded unless it is given, for the folder may come from elsewhere.

    Args:
        folder: of the run.
        config: its configuration.
        given: "module:Class" each, the values of `--extra-tasks`.
        synonyms: file of synonyms, for all tasks.

    Returns:
        In a sentence, why the run's own tasks cannot be used and what to do; None if they can.

    Raises:
        ValueError: for given tasks or synonyms that cannot be used.
    """
    settle_tasks(given, synonyms, key=FLAG)
    data = config.get("data")
    named = data.get("extra_tasks") if isinstance(data, Mapping) else None
    if given or not isinstance(named, list) or not named:
        return None
    try:
        for path in map(str, named):
            _check_elsewhere(path, folder)
        settle_tasks(map(str, named), synonyms)
    except ValueError as error:
        return f"{error}; add {FLAG} {shlex.join(map(str, named))}, where it can be imported, if you trust that code"
    return None


def _check_elsewhere(path: str, folder: Path) -> None:
    """Raise ValueError if a task's module would be loaded from the run's folder."""
    try:
        found = importlib.util.find_spec(path.partition(":")[0].partition(".")[0])
    except (ImportError, ValueError):
        return  # `settle_tasks` says what is wrong with it
    places = [place for place in (found.origin, *(found.submodule_search_locations or ())) if place] if found else []
    if any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places):
        raise ValueError(f"data.extra_tasks={path} lies in the run's folder, whose code is not run unasked")
