"""Pictures of rollouts: sent by a completion's number, never by a path."""

from __future__ import annotations

import io
import os
import sqlite3
from pathlib import Path

from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rlmed.data.images import load_image
from rlmed.recording.recorder import ROLLOUTS_FILE
from rlmed.studio.groups import images_of, read_group
from rlmed.studio.query import located
from rlmed.studio.runs import DAMAGE
from rlmed.studio.state import studio_of

SIDES = {"small": 512, "large": 2048}
"""Longest side in pixels, by value of `size`."""
QUALITY = 90


def send_image(request: Request) -> Response:
    """Return picture `?number=` of the question of rollout `?rollout=` of run `?run=`, as JPEG.

    It is decoded and encoded again: what is no picture is not sent, wherever a record points. 404
    for any other numbers.
    """
    studio = studio_of(request)
    rollouts = studio.run(request).file(ROLLOUTS_FILE)
    try:
        rollout, number = (int(request.query_params.get(name, "")) for name in ("rollout", "number"))
        side = SIDES[request.query_params.get("size", "small")]
        place = studio.indexing.use(rollouts, lambda _, connection: located(connection, rollout))
        if place is None or number < 0:
            raise LookupError
        image = open_image(images_of(read_group(rollouts, *place))[number], side)
    except (*DAMAGE, sqlite3.Error):
        raise HTTPException(404, "There is no such picture.") from None
    target = io.BytesIO()
    image.save(target, "JPEG", quality=QUALITY)
    return Response(target.getvalue(), media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})


def open_image(path: str, side: int) -> Image.Image:
    """Return the picture that a record names, its longest side at most `side` pixels.

    Raises:
        OSError: for what is no regular file: a pipe would be waited for.
        BadImageError: as `load_image`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(path)
    return load_image(Path(path), max_side=side)
