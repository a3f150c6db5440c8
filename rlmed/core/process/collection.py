"""Put off garbage collection while the libraries load: it takes a fifth of that time for nothing.

Loading makes half a million objects, and none of them is garbage.
"""

from __future__ import annotations

import atexit
import gc
from typing import Any

OBJECTS = 1_000_000
"""Collection resumes by itself when there are so many more; torch and transformers make half."""
_USUAL: list[tuple[int, int, int]] = []
"""The thresholds before `put_off`; empty if collection is not put off."""


def put_off() -> None:
    """Put off garbage collection until `resume`; idempotent."""
    if not _USUAL:
        _USUAL.append(gc.get_threshold())
        gc.set_threshold(OBJECTS, *_USUAL[0][1:])
        gc.callbacks.append(_on_collection)


def resume() -> None:
    """Collect as usual, but leave out what has been loaded; no-op if collection is not put off."""
    if _USUAL:
        gc.callbacks.remove(_on_collection)
        gc.set_threshold(*_USUAL.pop())
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries of C++ take what is never collected for leaks


def _on_collection(phase: str, info: dict[str, Any]) -> None:
    resume()
