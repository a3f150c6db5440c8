"""Pictures of rollouts: sent by a completion's number, never by a path."""

from __future__ import annotations

import io
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rlmed.data.images import load_image
from rlmed.recording.recorder import ROLLOUTS_FILE
from rlmed.studio.groups import images_of, read_group
from rlmed.studio.query import located
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
        with studio.indexing.index(rollouts).open() as connection:
            place = located(connection, rollout)
        if place is None or number < 0:
            raise LookupError
        image = load_image(Path(images_of(read_group(rollouts, *place))[number]), max_side=side)
    except (ValueError, OSError, LookupError, OverflowError, TypeError):
        raise HTTPException(404, "There is no such picture.") from None
    target = io.BytesIO()
    image.save(target, "JPEG", quality=QUALITY)
    return Response(target.getvalue(), media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})
