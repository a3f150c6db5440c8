"""The page that searches a run's rollouts."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from rlmed.studio.state import studio_of


def show_rollouts(request: Request) -> Response:
    """Return the rollouts of `?run=` that fit the filters."""
    return studio_of(request).page("rollouts.html.j2", request)
