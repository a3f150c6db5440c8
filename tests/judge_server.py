"""A server with OpenAI's protocol on a free port of this machine, that says what a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server sends."""

    text: str = ""
    """The judge's words, in a chat completion."""
    status: int = 200
    body: bytes | None = None
    """In place of a chat completion."""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class JudgeServer:
    """What a test knows of its server."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of the requests so far."""
    keys: set[str] = field(default_factory=set)
    most_at_a_time: int = 0


def prompt_of(body: Mapping[str, Any]) -> str:
    """The text of a request's message."""
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


@contextmanager
def judging(answer: Callable[[str, int], Reply]) -> Iterator[JudgeServer]:
    """Serve; `answer` gets a prompt and its number, from 1, and may wait or raise to hang up."""
    lock = threading.Lock()
    now = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                now += 1
                server.bodies.append(body)
                number = len(server.bodies)
                server.keys.add(self.headers["Authorization"])
                server.most_at_a_time = max(server.most_at_a_time, now)
            try:
                reply = answer(prompt_of(body), number)
            except ConnectionError:
                self.close_connection = True
                return
            finally:
                with lock:
                    now -= 1
            message = {"role": "assistant", "content": reply.text}
            completion = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            completion["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
            sent = json.dumps(completion).encode() if reply.body is None else reply.body
            self.send_response(reply.status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": len(sent),
                **reply.headers,
            }.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *arguments: object) -> None: ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """A client that gave up is none."""

    http = Quiet(("127.0.0.1", 0), Handler)
    server = JudgeServer(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
