"""What all pages of the studio share: folders, token, cache and templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from starlette.requests import Request
from starlette.responses import HTMLResponse

from rlmed.report.page import ASSETS as REPORT_ASSETS
from rlmed.report.page import page_environment

ASSETS = Path(__file__).parent / "assets"
THEME_COOKIE = "rlmed_studio_theme"
THEMES = ("light", "dark")


class Studio:
    """One running studio.

    A handler gets it with `studio_of(request)` and answers with `studio.page(...)`.

    Attributes:
        folders: resolved folders below which runs are shown; nothing outside of them is read for a
            run's page.
        token: secret that opens the pages; None lets every user of this machine in.
        cache: folder for what is derived from runs; made when something is written.
        templates: Jinja environment over `rlmed/studio/assets` and `rlmed/report/assets`, with the
            report's filters; escapes all values.
    """

    def __init__(self, folders: Sequence[Path], *, token: str | None, cache: Path) -> None:
        self.folders = tuple(folders)
        self.token = token
        self.cache = cache
        self.templates: Environment = page_environment()
        self.templates.loader = FileSystemLoader([ASSETS, REPORT_ASSETS])

    def page(self, template: str, request: Request, *, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a page.

        Args:
            template: its file in `assets/`, which extends `base.html.j2` (or a fragment, which does
                not).
            request: the request to answer; the template sees it as `request`.
            status: HTTP status.
            values: what else the template reads.
        """
        theme = request.cookies.get(THEME_COOKIE, "")
        shared = {"request": request, "nav": request.app.state.nav, "theme": theme if theme in THEMES else ""}
        return HTMLResponse(self.templates.get_template(template).render(shared | values), status)


def studio_of(request: Request) -> Studio:
    """Return the studio that a request was sent to."""
    studio = request.app.state.studio
    assert isinstance(studio, Studio)
    return studio
