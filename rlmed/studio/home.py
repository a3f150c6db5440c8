"""Pages of runs: the list, one run, several runs side by side."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from rlmed.studio.state import studio_of


def show_runs(request: Request) -> Response:
    """Return the list of runs."""
    return studio_of(request).page("runs.html.j2", request)


def show_run(request: Request) -> Response:
    """Return the page of one run, `?name=`."""
    return studio_of(request).page("run.html.j2", request)


def show_comparison(request: Request) -> Response:
    """Return several runs, `?run=a&run=b`, side by side."""
    return studio_of(request).page("compare.html.j2", request)
