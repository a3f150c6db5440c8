"""Sides that run in their own process; this module imports nothing, so spawning is instant."""

from __future__ import annotations

from multiprocessing.connection import Connection


def serve(answers: list[object], pipe: Connection) -> None:
    """Answers in turn."""
    pipe.send("ready")
    for given in answers:
        if pipe.recv() != "go":
            return
        pipe.send(given)
    pipe.recv()  # until the other end says that it is enough


def die(pipe: Connection) -> None:
    """Before it is ready."""
