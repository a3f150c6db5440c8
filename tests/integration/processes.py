"""Finds the processes that a run has started, by a mark in their environment."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

MARK = "RLMED_TEST_MARK"


def new_mark() -> dict[str, str]:
    """An environment whose processes, and theirs, can be told from all others."""
    return {MARK: uuid.uuid4().hex}


def marked(mark: dict[str, str], title: str = "") -> list[int]:
    """Process ids with this mark whose command line holds `title`."""
    needle = f"{MARK}={mark[MARK]}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # it has ended, or is another user's
        if needle in environment and title.encode() in command and state != "Z":
            found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something to become true; fails with `what` otherwise."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)
