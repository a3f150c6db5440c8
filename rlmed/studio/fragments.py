"""Parts of pages that an open page asks for again while a run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response


def tag_of(*parts: object) -> str:
    """Return an entity tag that differs whenever a part does."""
    return f'"{hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()[:24]}"'


def answer_if_changed(request: Request, tag: str, answer: Callable[[], Response]) -> Response:
    """Return 304 to a page that has what `tag` names, or else the answer with this tag."""
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    changed = answer()
    changed.headers["ETag"] = tag
    return changed
