"""What all pages of the studio share: folders, token, cache and templates."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse

from rlmed.core.files.jsonlines import finite
from rlmed.report.page import ASSETS as REPORT_ASSETS
from rlmed.report.page import page_environment
from rlmed.report.plots import Readout
from rlmed.studio.asking import Asker
from rlmed.studio.indexing import Indexing
from rlmed.studio.pictures import Pictures
from rlmed.studio.runs import Run, Runs
from rlmed.studio.uploads import Uploads

ASSETS = Path(__file__).parent / "assets"
THEME_COOKIE = "rlmed_studio_theme"
THEMES = ("light", "dark")
KEPT = 32
"""Pages whose figures are kept, to be shown again while nothing has changed."""
REST = 10.0
"""A page that takes long is not drawn anew at every step: drawing may take a tenth of the time."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    value: Any
    stamp: str
    made: float
    """When, on the monotonic clock."""
    took: float
    """Seconds."""


class Studio:
    """One running studio.

    A handler gets it with `studio_of(request)` and answers with `studio.page(...)`.

    Attributes:
        folders: resolved folders below which runs are shown; nothing outside of them is read for a
            run's page.
        token: secret that opens the pages; None lets every user of this machine in.
        cache: folder for what is derived from runs; made when something is written.
        runs: the runs below the folders.
        indexing: the indexes of their rollouts.
        models: folders or names of models that can be asked, besides the runs' checkpoints.
        drawing: held by the one request whose view of an uploaded file is drawn.
        pictures: the pictures below the folders and those of `images`.
        asker: asks them.
        templates: Jinja environment over `rlmed/studio/assets` and `rlmed/report/assets`, with the
            report's filters; escapes all values.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        token: str | None,
        cache: Path,
        models: Sequence[str] = (),
        images: Sequence[Path] = (),
    ) -> None:
        self.folders = tuple(folders)
        self.token = token
        self.cache = cache
        self.runs = Runs(self.folders)
        self.indexing = Indexing(cache)
        self.models = tuple(models)
        self.pictures = Pictures([*self.folders, *images])
        self.asker = Asker(Uploads())
        self.templates: Environment = page_environment()
        self.templates.loader = FileSystemLoader([ASSETS, REPORT_ASSETS])
        self.templates.filters |= {"instant": _instant, "moment": _moment, "curves": _curves}
        self.drawing = asyncio.Semaphore(1)
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, request: Request, parameter: str = "run") -> Run:
        """Return the run that the address names.

        Raises:
            HTTPException: 404 if no run below the studio's folders has this name.
        """
        return self.found(request.query_params.get(parameter, ""))

    def found(self, name: str) -> Run:
        """Return the run of this name.

        Raises:
            HTTPException: 404 as in `run`.
        """
        run = self.runs.named(name)
        if run is None:
            raise HTTPException(404, f"No run below the studio's folders is named {name[:200]!r}.")
        return run

    def kept(self, key: Hashable, stamp: str, make: Callable[[], Any]) -> Any:
        """Return what `make` has returned for this key and stamp before, or else call it.

        Args:
            key: what is made.
            stamp: changes when it must be made anew, such as `Runs.stamp`.
            make: makes it.
        """
        return self.lately_kept(key, stamp, make, rest=0)[0]

    def lately_kept(self, key: Hashable, stamp: str, make: Callable[[], Any], *, rest: float = REST) -> tuple[Any, str]:
        """Return what `kept` does, or what is old but was made lately; and its stamp.

        Args:
            key: what is made.
            stamp: changes when it must be made anew, such as `Runs.stamp`.
            make: makes it.
            rest: time for which it is good, as a multiple of the time that it took.
        """
        with self._lock:
            found = self._kept.get(key)
        if found is not None and (found.stamp == stamp or time.monotonic() < found.made + rest * found.took):
            return found.value, found.stamp
        began = time.monotonic()
        value = make()
        made = time.monotonic()
        with self._lock:
            self._kept[key] = _Kept(value, stamp, made, made - began)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return value, stamp

    def close(self) -> None:
        """Stop answers and remove uploaded files."""
        self.asker.close()
        self.asker.uploads.close()

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
        text = self.templates.get_template(template).render(shared | values)
        # a record may hold half of a surrogate pair
        return HTMLResponse(text.encode("utf-8", "replace"), status)


def studio_of(request: Request) -> Studio:
    """Return the studio that a request was sent to."""
    studio = request.app.state.studio
    assert isinstance(studio, Studio)
    return studio


def _instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _moment(seconds: float) -> str:
    """Return a time as a short local date; the page's script says how long ago it was."""
    return datetime.fromtimestamp(seconds).strftime("%b %d, %H:%M")


def _curves(readout: Readout) -> str:
    """Return what the page's script reads of a plot, as JSON."""
    return json.dumps(finite(dataclasses.asdict(readout)), separators=(",", ":"))
