"""The pages of the studio, in the order of its navigation.

To add one: a module with a handler, a template in `assets/` that extends `base.html.j2`, a `Page`
here. A handler takes a `Request` and returns a `Response`; a plain function runs in a thread, an
`async` one in the event loop. An `HTTPException` of starlette (404, 400, …) becomes a page that
shows its detail as text. `POST` handlers are reached by this origin only (`rlmed.studio.security`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlmed.studio.home import show_comparison, show_run, show_runs
from rlmed.studio.search import show_rollouts


@dataclass(frozen=True, slots=True)
class Page:
    """One address of the studio."""

    path: str
    """Route in starlette's form, such as "/image/{number:int}"."""
    handler: Callable[..., Any]
    label: str | None = None
    """Name in the navigation; None leaves the page out of it."""
    methods: tuple[str, ...] = ("GET",)


PAGES = (
    Page("/", show_runs, "Runs"),
    Page("/run", show_run),
    Page("/compare", show_comparison, "Compare"),
    Page("/rollouts", show_rollouts, "Rollouts"),
)
