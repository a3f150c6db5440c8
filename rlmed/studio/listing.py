"""The page that lists the runs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from rlmed.report.headline import WINDOW
from rlmed.studio.fragments import answer_if_changed, tag_of
from rlmed.studio.runs import STATES
from rlmed.studio.state import studio_of

MOST = 100
"""Runs shown, the latest; the filter finds older ones."""


def show_runs(request: Request) -> Response:
    """Return the list of runs, `?words=` only those whose name contains all of these."""
    return _answer(request, "runs.html.j2", _tag(request))


def show_runs_live(request: Request) -> Response:
    """Return the table alone, for a page that is open; 304 if it shows the same."""
    tag = _tag(request)
    return answer_if_changed(request, tag, lambda: _answer(request, "runs_table.html.j2", tag))


def _tag(request: Request) -> str:
    runs = studio_of(request).runs
    return tag_of(*((run.name, runs.stamp(run)) for run in runs.all()))


def _answer(request: Request, template: str, tag: str) -> Response:
    studio = studio_of(request)
    words = request.query_params.get("words", "").split()
    glances = [
        glance
        for glance in studio.runs.glances()
        if all(word.casefold() in glance.run.name.casefold() for word in words)
    ]
    return studio.page(
        template,
        request,
        glances=glances[:MOST],
        total=len(glances),
        words=" ".join(words),
        states=STATES,
        window=WINDOW,
        folders=[str(folder) for folder in studio.folders],
        tag=tag,
    )
