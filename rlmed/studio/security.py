"""Who may ask the studio: its own names, its own pages, and who has the token.

Without these checks a page of another site could reach a server on loopback through the reader's
browser: by a name that it has point at 127.0.0.1 (DNS rebinding), or by a form that it sends.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SAFE = ("GET", "HEAD")
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # not no-referrer: with it, browsers send forms of our own pages with `Origin: null`
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
OPEN = "Open the address that `python -m rlmed.studio` printed: it holds the token of this run of the studio.\n"


class Guard:
    """Middleware that answers a request only if host, origin and token are right.

    Args:
        app: what answers the requests that pass.
        token: secret that opens the pages; None for none.
        names: host names, lower case, by which browsers may reach the studio.
        any_address: whether a `Host` that is an IP address passes, as for a server that listens on
            all of them; no name points at it then, so it cannot be rebound.
    """

    def __init__(self, app: ASGIApp, token: str | None, names: Iterable[str], *, any_address: bool = False) -> None:
        self._app = app
        self._token = token
        # not the token: a browser sends a host's cookies to all of its ports
        self.cookie, self._session = f"rlmed_studio_{secrets.token_hex(6)}", secrets.token_urlsafe(32)
        self._names = frozenset(names)
        self._any_address = any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse with 400, 401 or 403; a wrong WebSocket is closed."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refusal(HTTPConnection(scope))
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refusal(scope, receive, send_with_headers)

    def _refusal(self, request: HTTPConnection) -> Response | None:
        """Return the answer to a request that may not pass; None for one that may."""
        host = request.headers.get("host", "")
        if not self._is_own(host):
            return PlainTextResponse("This name is not one of the studio's: see --allow-host.\n", 400)
        if (request.scope["type"] == "websocket" or request.scope["method"] not in SAFE) and not _same_origin(request):
            return PlainTextResponse("This request came from another page than the studio's.\n", 403)
        if self._token is None:
            return None
        given = request.query_params.get("token")
        if given is not None and request.scope["type"] == "http" and request.scope["method"] in SAFE:
            return self._let_in(request, given)
        if _equal(request.cookies.get(self.cookie, ""), self._session):
            return None
        return PlainTextResponse(OPEN, 401)

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_address

    def _let_in(self, request: HTTPConnection, given: str) -> Response:
        """Give a cookie for a right token, and have it leave the address and the history."""
        assert self._token is not None
        if not _equal(given, self._token):
            return PlainTextResponse(f"This token is wrong. {OPEN}", 401)
        rest = urlencode([(key, value) for key, value in request.query_params.multi_items() if key != "token"])
        # one slash: "//name" would be another host
        path = "/" + request.url.path.lstrip("/\\")
        answer = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
        answer.set_cookie(self.cookie, self._session, httponly=True, samesite="strict", path="/")
        return answer


def _equal(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _same_origin(request: HTTPConnection) -> bool:
    """Return True if the browser says that a page of this server sent the request."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None and site not in ("same-origin", "none"):
        return False
    if origin is None:
        return site is not None
    sender: str = urlsplit(origin).netloc
    host: str = request.headers.get("host", "")
    return sender.lower() == host.lower()
