"""The studio's web server: routes, errors as pages, and the address to open."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route

from rlmed.report.page import ASSETS as REPORT_ASSETS
from rlmed.studio.curves import warm_up
from rlmed.studio.pages import PAGES
from rlmed.studio.security import Guard
from rlmed.studio.state import ASSETS, THEME_COOKIE, THEMES, Studio, studio_of

SERVED = {path.name: path for path in (*ASSETS.iterdir(), REPORT_ASSETS / "report.css") if path.suffix != ".j2"}
"""Files under /assets/, by name."""
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
YEAR = 365 * 24 * 3600
GRACE_S = 3
"""Seconds that answers on their way have after Ctrl-C."""


def build(studio: Studio, names: Iterable[str] = LOOPBACK_NAMES, *, any_address: bool = False) -> Guard:
    """Return the application that answers for a studio.

    Args:
        studio: the folders and the token.
        names: host names by which browsers may reach it.
        any_address: whether they may reach it by any IP address.
    """
    routes = [Route(page.path, page.handler, methods=list(page.methods)) for page in PAGES]
    routes += [Route("/assets/{name}", _asset), Route("/theme", _theme)]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _error}, lifespan=_closing)
    app.state.studio = studio
    app.state.nav = [page for page in PAGES if page.label is not None]
    return Guard(app, studio.token, names, any_address=any_address)


def serve(studio: Studio, host: str, port: int, more_names: Iterable[str], *, say: Callable[[str], Any]) -> None:
    """Serve until Ctrl-C.

    Args:
        studio: the folders and the token.
        host: address or name to listen on.
        port: port; 0 takes a free one.
        more_names: further names by which browsers may reach it.
        say: is given the lines for the user.

    Raises:
        OSError: if the address cannot be listened on.
    """
    listener = _listen(host, port)
    with listener:
        address = listener.getsockname()[0]
        everywhere = ipaddress.ip_address(address).is_unspecified
        local = ipaddress.ip_address(address).is_loopback
        names = {*LOOPBACK_NAMES, host.lower(), address, *(name.lower() for name in more_names)}
        if not local:
            names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        say(greeting(address, listener.getsockname()[1], studio.token))
        app = build(studio, names, any_address=everywhere)
        threading.Thread(target=warm_up, name="warm up", daemon=True).start()
        # no access log: it would show the token
        settings = uvicorn.Config(
            app, access_log=False, log_level="warning", server_header=False, timeout_graceful_shutdown=GRACE_S
        )
        uvicorn.Server(settings).run(sockets=[listener])


@asynccontextmanager
async def _closing(app: Starlette) -> AsyncIterator[None]:
    yield
    app.state.studio.close()


def greeting(address: str, port: int, token: str | None) -> str:
    """Return the lines that tell the user where the studio is.

    Example:
        >>> greeting("::1", 8642, None)
        'studio: http://[::1]:8642/\\n'
    """
    parsed = ipaddress.ip_address(address)
    shown = "localhost" if parsed.is_unspecified else f"[{address}]" if parsed.version == 6 else address
    secret = "" if token is None else f"?token={quote(token, safe='')}"
    said = f"studio: http://{shown}:{port}/{secret}\n"
    if not parsed.is_loopback:
        said += (
            "studio: open to the network, and traffic is not encrypted: who can listen reads all of it, the token "
            "included; `ssh -L` is safer (docs/studio.md)\n"
        )
    return said


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # a browser that is quick waits from here on
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {host} --port {port} cannot be listened on ({error}): choose another") from error
    return listener


def _asset(request: Request) -> Response:
    path = SERVED.get(request.path_params["name"])
    if path is None:
        raise HTTPException(404, "There is no such file.")
    return FileResponse(path, headers={"Cache-Control": "no-cache"})


def _theme(request: Request) -> Response:
    """Remember light or dark, then go back to where the reader was."""
    back = "/" + request.query_params.get("back", "").lstrip("/\\")
    answer = RedirectResponse(back, 303)
    if request.query_params.get("to") in THEMES:
        answer.set_cookie(THEME_COOKIE, request.query_params["to"], max_age=YEAR, samesite="strict", path="/")
    return answer


def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    heading = {400: "This cannot be read", 404: "Not found", 405: "Not allowed"}.get(error.status_code, "Error")
    return studio_of(request).page(
        "message.html.j2", request, status=error.status_code, heading=heading, detail=error.detail
    )
