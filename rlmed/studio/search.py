"""The page that searches a run's rollouts."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rlmed.recording.recorder import ROLLOUTS_FILE
from rlmed.report.plots import Plot, draw_values
from rlmed.studio.curves import draw_plots
from rlmed.studio.fragments import answer_if_changed, tag_of
from rlmed.studio.groups import show_hits
from rlmed.studio.query import PAGE, SORTS, Filters, kinds, of_prompt, search
from rlmed.studio.runs import Run
from rlmed.studio.state import studio_of


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
    index = studio.indexing.index(run.file(ROLLOUTS_FILE))
    with index.open() as connection:
        place = index.place(connection)
        tag = tag_of(place, filters)
        total = search(connection, filters)[0]
    values: dict[str, Any] = {"run": run, "filters": filters, "place": place, "total": total}
    return answer_if_changed(request, tag, lambda: studio.page("rollouts_live.html.j2", request, **values))


def _values(request: Request, run: Run, filters: Filters) -> dict[str, Any]:
    studio = studio_of(request)
    rollouts = run.file(ROLLOUTS_FILE)
    if not rollouts.exists():
        raise HTTPException(404, f"{run.name} has recorded no rollouts: only rlmed.launch samples some.")
    try:
        index = studio.indexing.index(rollouts)
        with index.open() as connection:
            place = index.place(connection)
            total, hits = search(connection, filters)
            tasks, modalities = kinds(connection)
            history = of_prompt(connection, filters.prompt) if filters.prompt else []
    except (OSError, sqlite3.Error) as error:
        raise HTTPException(500, f"The index in {studio.cache} cannot be used ({error}): see --cache.") from error
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
        "cards": show_hits(rollouts, hits),
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
