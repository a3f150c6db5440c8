"""The page that asks a model about uploaded pictures, and what its script calls."""

from __future__ import annotations

import io
import json
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from rlmed.core.types import LETTERS
from rlmed.data.images import MAX_IMAGES
from rlmed.studio.asking import Question
from rlmed.studio.models import ModelChoice, model_choices
from rlmed.studio.state import Studio, studio_of
from rlmed.studio.volumes import View
from rlmed.tasks.registry import known_tasks

MOST_TEXT = 20_000
"""Characters of a question, and of all options."""
MOST_TOKENS = 8192
MOST_BODY = 4 << 20
"""Bytes of a question, or of a list of files."""


def show_ask(request: Request) -> Response:
    """Return the page."""
    studio = studio_of(request)
    return studio.page(
        "ask.html.j2",
        request,
        models=_models(studio),
        tasks=known_tasks(),
        letters=LETTERS,
        most_images=MAX_IMAGES,
        most_tokens=MOST_TOKENS,
    )


async def take_file(request: Request) -> Response:
    """Keep the file that is the request's body; return its id. Its name is not sent."""
    length = request.headers.get("content-length", "")
    try:
        name = await studio_of(request).asker.uploads.receive(
            request.stream(), int(length) if length.isascii() and length.isdigit() else None
        )
    except (ValueError, OSError) as error:
        return _refused(error, 413)
    return JSONResponse({"id": name})


async def open_files(request: Request) -> Response:
    """Open `{"files": [id, …]}`; return what can be chosen of each source, and what is wrong.

    The `files` of a source are places in the list that was sent: the page knows their names.
    """
    uploads = studio_of(request).asker.uploads
    content = await _content(request)
    names = content.get("files")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise HTTPException(400, "files must be a list of texts")
    try:
        sources, problems = await run_in_threadpool(uploads.open, names)
        places = {name: place for place, name in enumerate(names)}
        described = [
            {
                "id": name,
                "files": [places[path.name] for path in uploads.source(name).files],
                **await run_in_threadpool(uploads.source(name).describe),
            }
            for name in sources
        ]
    except (ValueError, OSError) as error:
        return _refused(error)
    return JSONResponse({"sources": described, "problems": [{"file": place, "text": text} for place, text in problems]})


async def show_picture(request: Request) -> Response:
    """Return a view of a source as PNG, by `source` and the fields of `View` in the query.

    One at a time, and none that nobody waits for: who moves through a volume asks for many.
    """
    query = request.query_params
    try:
        view = _view({name: _number(value) if name in _NUMBERS else value for name, value in query.items()})
        source = studio_of(request).asker.uploads.source(query.get("source", ""))
        async with studio_of(request).drawing:
            if await request.is_disconnected():
                return Response(status_code=499)
            content = await run_in_threadpool(lambda: _png(source.picture(view)))
    except (ValueError, OSError) as error:
        return _refused(error)
    return Response(content, media_type="image/png")


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return content.getvalue()


async def answer_question(request: Request) -> Response:
    """Answer a question: events of `rlmed.studio.asking`, a line each, as they happen."""
    studio = studio_of(request)
    content = await _content(request)
    try:
        question = _question(content, await run_in_threadpool(_models, studio))
    except ValueError as error:
        return _refused(error)

    async def lines() -> AsyncIterator[str]:
        events = studio.asker.answer(question)
        try:
            async for event in events:
                yield json.dumps(event) + "\n"
        finally:
            await events.aclose()

    return StreamingResponse(lines(), media_type="application/x-ndjson", headers={"X-Accel-Buffering": "no"})


def _models(studio: Studio) -> list[ModelChoice]:
    return model_choices({run.name: run.file("checkpoints") for run in studio.runs.all()}, studio.models)


_NUMBERS = {
    "index": "the slice",
    "volume": "the volume",
    "center": "the window's center",
    "width": "the window's width",
}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _view(content: Mapping[str, Any]) -> View:
    """Read a view from JSON or a query; raises ValueError for what is none."""
    texts = {name: content.get(name, "") for name in ("plane", "window")}
    if not all(isinstance(text, str) and len(text) < 100 for text in texts.values()):
        raise ValueError("plane and window must be short texts")
    numbers = {name: content.get(name, 0) for name in _NUMBERS}
    for name, value in numbers.items():
        if not (type(value) in (int, float) and abs(value) < 1e9):
            raise ValueError(f"{_NUMBERS[name]} is no number below a billion: give one")
    return View(
        **texts,
        index=int(numbers["index"]),
        volume=int(numbers["volume"]),
        center=float(numbers["center"]),
        width=float(numbers["width"]),
    )


def _question(content: Mapping[str, Any], models: list[ModelChoice]) -> Question:
    """Read a question; raises ValueError for what is none, or a model that is not listed."""
    paths = {choice.key: choice.path for choice in models}
    if not isinstance(content.get("model"), str) or content["model"] not in paths:
        raise ValueError("this model is gone: load the page again")
    views, options = content.get("views", []), content.get("options", [])
    if not isinstance(views, list) or not all(isinstance(view, Mapping) for view in views):
        raise ValueError("views must be a list of objects")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError("options must be a list of texts")
    texts = {name: content.get(name, "") for name in ("question", "task", "modality")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"{', '.join(texts)} must be texts")
    if not texts["question"].strip():
        raise ValueError("the question is empty: write one")
    if sum(map(len, (*texts.values(), *options))) > MOST_TEXT:
        raise ValueError(f"question and options have more than {MOST_TEXT} characters: shorten them")
    temperature, seed, tokens = (content.get(name, 0) for name in ("temperature", "seed", "max_tokens"))
    if type(temperature) not in (int, float) or not 0 <= temperature <= 10:
        raise ValueError(f"the temperature is {temperature!r}: give a number from 0 to 10")
    if type(seed) is not int or not 0 <= seed < 1 << 31:
        raise ValueError(f"the seed is {seed!r}: give a whole number from 0")
    if type(tokens) is not int or not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"the longest answer is {tokens!r} tokens: give 1 to {MOST_TOKENS}")
    return Question(
        model=paths[content["model"]],
        views=tuple((str(view.get("source", "")), _view(view)) for view in views),
        options=tuple(map(_whole, options)),
        temperature=float(temperature),
        seed=seed,
        max_tokens=tokens,
        blank=bool(content.get("blank", True)),
        **{name: _whole(text) for name, text in texts.items()},
    )


async def _content(request: Request) -> Mapping[str, Any]:
    """Return the JSON object of a request, within `MOST_BODY`."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY:
            raise HTTPException(413, f"The request has more than {MOST_BODY} bytes.")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise HTTPException(400, "The request is no JSON object.")
    return content


def _refused(error: ValueError | OSError, status: int = 400) -> Response:
    """Return what is wrong on one line, without a path of the server."""
    said = f"it cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
    return JSONResponse({"error": " ".join(_whole(said).split())}, status)


def _whole(text: str) -> str:
    """Return a text without half surrogate pairs, which neither UTF-8 nor a tokenizer has."""
    return text.encode("utf-8", "replace").decode()
