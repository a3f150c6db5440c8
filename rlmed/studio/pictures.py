"""Picture files that records name: which of them are shown, and sent as JPEG."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from rlmed.data.images import load_image
from rlmed.studio.fragments import answer_if_changed, tag_of

SIDES = {"small": 512, "large": 2048}
"""Longest side in pixels, by value of `size`."""
QUALITY = 90


class Pictures:
    """The pictures that the studio shows: those that really lie below some folders.

    A run folder from elsewhere may name any file of this machine; links are followed before the
    place is looked at.

    Args:
        folders: the folders.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folder.resolve() for folder in folders)

    def describe(self, paths: Sequence[str]) -> list[dict[str, object]]:
        """Return each picture for the templates: its number, and whether and where it is there."""
        described: list[dict[str, object]] = []
        for number, path in enumerate(paths):
            place = _place(path)
            shown = place is not None and self._holds(place)
            there = place is not None and shown and os.path.isfile(place)
            elsewhere = str(place.parent) if place is not None and not shown and os.path.isfile(place) else None
            described.append({"number": number, "there": there, "elsewhere": elsewhere})
        return described

    def send(self, request: Request, path: str) -> Response:
        """Return a picture as JPEG, as large as `?size=` says; 304 to a page that has it.

        It is decoded and encoded again: what is no picture is not sent.

        Raises:
            LookupError: for a size that is none.
            OSError: for a file elsewhere, or that is no regular one: a pipe would be waited for.
            BadImageError: as `load_image`.
        """
        side = SIDES[request.query_params.get("size", "small")]
        place = _place(path)
        if place is None or not self._holds(place) or not os.path.isfile(place):
            raise FileNotFoundError(path)
        file = place.stat()
        # asked for again each time: another run's picture may come to have the same address
        tag = tag_of(path, file.st_dev, file.st_ino, file.st_mtime_ns, file.st_size, side)
        answer = answer_if_changed(request, tag, lambda: _jpeg(load_image(place, max_side=side)))
        answer.headers["Cache-Control"] = "private, no-cache"
        return answer

    def _holds(self, place: Path) -> bool:
        return any(place.is_relative_to(folder) for folder in self._folders)


def _place(path: str) -> Path | None:
    """Return where a path leads; None for one that no file can have."""
    try:
        return Path(os.path.realpath(path)) if path else None
    except (OSError, ValueError):
        return None


def _jpeg(image: Image.Image) -> Response:
    target = io.BytesIO()
    image.save(target, "JPEG", quality=QUALITY)
    return Response(target.getvalue(), media_type="image/jpeg")
