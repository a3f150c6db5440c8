"""Tasks by name: rlmed's own, and those that a user adds as `module:Class`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlmed.core.plugins import own_places, registered, search_own_code
from rlmed.core.spelling import closest
from rlmed.core.types import Example
from rlmed.tasks.base import Task
from rlmed.tasks.choice import Choice
from rlmed.tasks.grounding import Grounding
from rlmed.tasks.labels import Labels
from rlmed.tasks.metrics.sets import NO_SYNONYMS, read_synonyms
from rlmed.tasks.open import Open
from rlmed.tasks.report import Report

ENTRY_POINTS = "rlmed.tasks"
"""Group of entry points by which installed packages offer tasks."""
LABELS = Labels()
OWN: tuple[Task, ...] = (Choice(), Open(), Grounding(), LABELS, Report())
_TASKS: dict[str, Task] = {task.name: task for task in OWN}


def task_named(name: str, place: str = "its task") -> Task:
    """Return a task by its name; errors say that it is in `place`.

    Raises:
        ValueError: for an unknown one; suggests the closest.
    """
    if name not in _TASKS:
        near = closest(name, _TASKS)
        meant = f"did you mean {near}? Else choose" if near else "choose"
        flag = "--extra-tasks"
        where = flag if place.startswith("--") else f"data.extra_tasks (rlmed.ask, rlmed.report, rlmed.export: {flag})"
        raise ValueError(f"{place} {name!r} is unknown: {meant} from {', '.join(_TASKS)}, or add your own with {where}")
    return _TASKS[name]


def known_tasks() -> tuple[Task, ...]:
    """Return all tasks, those that a user has added last."""
    return tuple(_TASKS.values())


def task_of(example: Example) -> Task:
    """Return the task of an example."""
    return task_named(example.task)


def settle_tasks(paths: Iterable[str], synonyms: str | None, *, key: str = "data.extra_tasks") -> None:
    """Add a user's tasks, and give all tasks a file of synonyms.

    Args:
        paths: "module:Class" each; the working directory is searched too.
        synonyms: see `rlmed.tasks.metrics.sets.read_synonyms`; None for none.
        key: what errors call the place of `paths`.

    Raises:
        ValueError: if a task cannot be imported, is no `Task`, or has the name of a task of rlmed,
            or for a file that cannot be used.
    """
    try:
        meant = read_synonyms(Path(synonyms)) if synonyms else NO_SYNONYMS
    except ValueError as error:
        raise ValueError(f"{'--synonyms' if key.startswith('-') else 'data.synonyms'}: {error}") from error
    for path in paths:
        task = _load(path, key)
        if any(own.name == task.name for own in OWN):
            raise ValueError(f"{key}={path}: {task.name!r} is a task of rlmed: choose another name")
        _TASKS[task.name] = task
    for task in _TASKS.values():
        task.synonyms = meant


def _load(path: str, key: str) -> Task:
    if ":" not in path and path.isidentifier():
        made = registered(ENTRY_POINTS, path, f"{key} has {path!r}", "module:Class")
        return _checked(f"{key}={path}", _instance(f"{key}={path}", made))
    module_name, colon, class_name = path.partition(":")
    if not (module_name and colon and class_name.isidentifier()) or module_name.endswith(".py"):
        raise ValueError(f"{key} has {path!r}: write module:Class, for example my_tasks:Staging")
    search_own_code()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        raise ValueError(
            f"{key}={path}: module {module_name!r} cannot be imported from {own_places()} or the installed packages: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _checked(f"{key}={path}", _made(f"{key}={path}", class_name, module))


def _checked(place: str, made: Any) -> Task:
    missing = [name for name in ("name", "template", "main", "score_names") if not hasattr(made, name)]
    if not isinstance(made, Task) or missing:
        what = f"has no {missing[0]}" if isinstance(made, Task) else "is no rlmed.tasks.base.Task"
        raise ValueError(f"{place}: it {what}")
    if made.template.count("{question}") != 1 or made.main not in made.score_names:
        raise ValueError(f"{place}: its template needs {{question}} once, and its main score must be among score_names")
    return made


def _made(place: str, class_name: str, module: ModuleType) -> Any:
    if class_name not in vars(module):
        classes = [name for name, value in vars(module).items() if isinstance(value, type) and value is not Task]
        near = closest(class_name, classes)
        advice = f"did you mean {near}?" if near else "define it there"
        raise ValueError(f"{place}: {class_name!r} does not exist in {module.__file__}: {advice}")
    return _instance(place, vars(module)[class_name])


def _instance(place: str, made: Any) -> Any:
    try:
        return made()
    except (Exception, SystemExit) as error:  # a user's class may raise anything
        raise ValueError(f"{place}: it cannot be made: {type(error).__name__}: {error}") from error
