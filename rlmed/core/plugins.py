"""Find a user's own code: beside the configuration, in the working directory, or installed."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rlmed.core.spelling import closest

FOLDER = "RLMED_CODE"
"""Environment variable with the folder beside that of `--config-dir`.

Workers of a Ray that the run starts inherit it.
"""
DRIVER_FOLDERS = "RLMED_DRIVER_CODE"
"""Environment variable of workers of a Ray that was there before: the run's folders, by line."""


def beside(config_dir: str) -> None:
    """Let modules beside the folder `config_dir` be found, also by processes started later."""
    os.environ[FOLDER] = str(Path(config_dir).absolute().parent)


def own_folders() -> list[str]:
    """Return the folders that are searched for a user's modules besides the Python path."""
    there = os.environ.get(DRIVER_FOLDERS, "").split("\n")
    return list(dict.fromkeys(filter(None, [*there, os.getcwd(), os.environ.get(FOLDER)])))


def environment_of_workers() -> dict[str, str]:
    """Return variables by which processes that inherit none of ours search these folders first."""
    return {DRIVER_FOLDERS: "\n".join(own_folders())}


def own_places() -> str:
    """Return these folders in words."""
    return " or ".join(own_folders())


def search_own_code() -> None:
    """Append the folders of `own_folders` to `sys.path`."""
    sys.path.extend(folder for folder in own_folders() if folder not in sys.path)


def registered(group: str, name: str, place: str, written: str) -> Any:
    """Load what an installed package, or one beside the user's modules, registers by name.

    Args:
        group: of the entry points.
        name: of the entry point.
        place: begins the messages of errors.
        written: how a name with its module would be written.

    Raises:
        ValueError: if none has this name, several packages have, or it cannot be loaded.
    """
    search_own_code()
    found = entry_points(group=group)
    if name not in found.names:
        near = closest(name, found.names)
        known = f"; installed packages have {', '.join(sorted(found.names))}" if found.names else ""
        meant = f"did you mean {near}? Else write" if near else "write"
        raise ValueError(
            f"{place}, and no installed package has an entry point {group} of this name: {meant} {written}{known}"
        )
    values = sorted({entry.value for entry in found if entry.name == name})
    if len(values) > 1:
        raise ValueError(f"{place}, which several packages register ({', '.join(values)}): write {written}")
    try:
        return found[name].load()
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        raise ValueError(
            f"{place}: its entry point {values[0]} cannot be loaded: {type(error).__name__}: {error}: "
            "correct or reinstall its package"
        ) from error
