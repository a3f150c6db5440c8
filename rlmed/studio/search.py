"""The page that searches a run's rollouts."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rlmed.recording.recorder import ROLLOUTS_FILE
from rlmed.report.plots import Plot, draw_values
from rlmed.studio.curves import draw_plots
from rlmed.studio.fragments import answer_if_changed, tag_of
from rlmed.studio.groups import show_hits
from rlmed.studio.index import Index
from rlmed.studio.query import PAGE, SORTS, Filters, kinds, of_prompt, search
from rlmed.studio.runs import Run
from rlmed.studio.state import Studio, studio_of

T = TypeVar("T")


def show_rollouts(request: Request) -> Response:
    """Return the rollouts of `?run=` that fit the filters; without it, the runs to choose from."""
    studio = studio_of(request)
    if not request.query_params.get("run"):
        with_rollouts = [one for one in studio.runs.glances() if one.run.file(ROLLOUTS_FILE).exists()]
        return studio.page("rollouts_of.html.j2", request, glances=with_rollouts)
    run = studio.run(request)
    filters = Filters.read(request.query_params)
    return studio.page("rollouts.html.j2", request, **_values(request, run, filters))


def show_rollouts_live(request: Request) -> Response:
    """Return how far the index is and how many rollouts fit; 304 if nothing changed."""
    studio = studio_of(request)
    run = studio.run(request)
    filters = Filters.read(request.query_params)

    def ask(index: Index, connection: sqlite3.Connection) -> Response:
        place = index.place(connection)

        def answer() -> Response:
            values: dict[str, Any] = {"run": run, "filters": filters, "place": place}
            return studio.page("rollouts_live.html.j2", request, **values, total=search(connection, filters)[0])

        return answer_if_changed(request, tag_of(place, filters), answer)

    return _asked(studio, run, ask)


def _asked(studio: Studio, run: Run, ask: Callable[[Index, sqlite3.Connection], T]) -> T:
    """Ask the index of a run; 404 for a run without rollouts, 500 if the index cannot be used."""
    rollouts = run.file(ROLLOUTS_FILE)
    if not rollouts.is_file():
        raise HTTPException(404, f"{run.name} has recorded no rollouts: only rlmed.launch samples some.")
    try:
        return studio.indexing.use(rollouts, ask)
    except (OSError, sqlite3.Error) as error:
        raise HTTPException(500, f"The index in {studio.cache} cannot be used ({error}): see --cache.") from error


def _values(request: Request, run: Run, filters: Filters) -> dict[str, Any]:
    studio = studio_of(request)

    def ask(index: Index, connection: sqlite3.Connection) -> tuple[Any, ...]:
        history = of_prompt(connection, filters.prompt) if filters.prompt else []
        return index.place(connection), search(connection, filters), kinds(connection), history

    place, (total, hits), (tasks, modalities), history = _asked(studio, run, ask)
    pages = max(1, -(-total // PAGE))
    return {
        "run": run,
        "filters": filters,
        "sorts": {value: label for value, (label, _) in SORTS.items()},
        "place": place,
        "tag": tag_of(place, filters),
        "total": total,
        "page": min(filters.page, pages),
        "pages": pages,
        "tasks": tasks,
        "modalities": modalities,
        "cards": show_hits(run.file(ROLLOUTS_FILE), hits, studio.pictures),
        "here": urlencode({"run": run.name}) + (f"&{query}" if (query := filters.query()) else ""),
        "history": _history(history),
        "running": studio.runs.glance(run).state in ("running", "silent") or not place.done,
    }


def _history(points: Sequence[tuple[int, float | None]]) -> list[Plot]:
    """Draw the mean reward of a prompt's groups by step; nothing for fewer than two."""
    known = [(step, reward) for step, reward in points if reward is not None]
    if len(known) < 2:
        return []
    return draw_plots(lambda: [draw_values("Reward of this prompt", "mean of each group, by step", known)])
