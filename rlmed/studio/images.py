"""Pictures of rollouts: sent by a completion's number, never by a path."""

from __future__ import annotations

import sqlite3

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rlmed.recording.recorder import ROLLOUTS_FILE
from rlmed.studio.groups import images_of, read_group
from rlmed.studio.index import prompt_key
from rlmed.studio.query import located
from rlmed.studio.runs import DAMAGE
from rlmed.studio.state import studio_of


def send_image(request: Request) -> Response:
    """Return picture `?number=` of the question of rollout `?rollout=` of run `?run=`, as JPEG.

    404 for any other numbers, and where `?prompt=` is not the key of the question: a run that
    started anew gives its numbers to other rollouts.
    """
    studio = studio_of(request)
    rollouts = studio.run(request).file(ROLLOUTS_FILE)
    try:
        rollout, number = (int(request.query_params.get(name, "")) for name in ("rollout", "number"))
        place = studio.indexing.use(rollouts, lambda _, connection: located(connection, rollout))
        if place is None or number < 0:
            raise LookupError
        group = read_group(rollouts, *place)
        if prompt_key(group) != request.query_params.get("prompt"):
            raise LookupError
        return studio.pictures.send(request, images_of(group)[number])
    except (*DAMAGE, sqlite3.Error):
        raise HTTPException(404, "There is no such picture.") from None
