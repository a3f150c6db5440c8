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

from rlmed.studio.ask_page import answer_question, open_files, show_ask, show_picture, take_file
from rlmed.studio.comparison import show_comparison
from rlmed.studio.detail import show_run, show_run_live
from rlmed.studio.evaluate_page import send_row_image, show_evaluations
from rlmed.studio.images import send_image
from rlmed.studio.listing import show_runs, show_runs_live
from rlmed.studio.search import show_rollouts, show_rollouts_live


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
    Page("/runs/live", show_runs_live),
    Page("/run", show_run),
    Page("/run/live", show_run_live),
    Page("/compare", show_comparison, "Compare"),
    Page("/rollouts", show_rollouts, "Rollouts"),
    Page("/rollouts/live", show_rollouts_live),
    Page("/image", send_image),
    Page("/evaluate", show_evaluations, "Evaluate"),
    Page("/evaluate/image", send_row_image),
    Page("/ask", show_ask, "Ask"),
    Page("/ask/files", take_file, methods=("POST",)),
    Page("/ask/sources", open_files, methods=("POST",)),
    Page("/ask/picture", show_picture),
    Page("/ask/answer", answer_question, methods=("POST",)),
)
