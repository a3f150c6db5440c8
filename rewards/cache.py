"""What slow rewards have returned, on disk: whoever asks again gets it without a call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlmed.core.files.atomic import refusal
from rlmed.core.types import Example

try:
    import fcntl
except ImportError:  # not POSIX: treated as a file system without locks
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

CACHE_FILE = "rewards.jsonl"
"""In the run's folder."""


def key_of(name: str, settings: Mapping[str, Any], example: Example, text: str) -> str:
    """Return the key of a reward: a SHA-256 of all it may depend on.

    Args:
        name: of the reward.
        settings: those that change its value, of JSON's types.
        example: counts with its pictures' content, wherever they lie.
        text: the completion's.
    """
    fields = {
        entry.name: getattr(example, entry.name)
        for entry in dataclasses.fields(example)
        if entry.name not in ("image", "more_images")
    }
    fields["images"] = [_digest(str(path)) for path in example.images]
    content = json.dumps([name, settings, fields, text], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()


@functools.lru_cache(maxsize=65536)
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class RewardCache:
    """Values by key in a file of JSON Lines that only grows, one line for each call.

    A line is written at once, under a lock, so several processes may share the file. A process
    killed in the middle of one leaves a damaged line, which is skipped with a warning; the next
    line begins behind it. The first value of a key counts.

    Example:
        >>> cache = RewardCache(Path("run/rewards.jsonl"))                    # doctest: +SKIP
        >>> cache.add("judge", {key: 0.7}, calls=1, seconds=2.1)              # doctest: +SKIP
        >>> cache.get(key)                                                    # doctest: +SKIP
        0.7
    """

    def __init__(self, path: Path | None) -> None:
        """Read `path`, if it exists; None keeps values in memory alone.

        Raises:
            RecordError: if it cannot be read.
        """
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._values: dict[str, float] = {}
        self._notes: dict[str, str] = {}
        self._spent: dict[str, tuple[int, float]] = {}
        if path is not None and path.exists():
            try:
                self._read(path)
            except OSError as error:
                raise refusal(path, error) from error

    def get(self, key: str) -> float | None:
        """Return the value of a key; None if there is none."""
        return self._values.get(key)

    def note(self, key: str) -> str:
        """Return the text kept with a key's value; "" if there is none."""
        return self._notes.get(key, "")

    def spent(self, name: str) -> tuple[int, float]:
        """Return how many calls a reward made, and their seconds, according to the file."""
        return self._spent.get(name, (0, 0.0))

    def add(
        self,
        name: str,
        values: Mapping[str, float],
        *,
        calls: int,
        seconds: float,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Keep what a call returned, or nothing but what it took if it failed.

        Args:
            name: of the reward.
            values: finite numbers by key.
            calls: number of calls.
            seconds: that they took.
            notes: texts to keep with the values, by key.

        Raises:
            RecordError: if the file cannot be written.
        """
        line: dict[str, Any] = {"reward": name, "values": dict(values), "calls": calls, "seconds": round(seconds, 3)}
        if notes:
            line["notes"] = dict(notes)
        with self._lock:
            self._take(values, notes or {})
            if self._path is not None:
                try:
                    self._append(self._path, json.dumps(line, allow_nan=False).encode() + b"\n")
                except OSError as error:
                    raise refusal(self._path, error) from error

    def close(self) -> None:
        """Close the file; a later `add` opens it again."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _take(self, values: Mapping[str, float], notes: Mapping[str, str]) -> None:
        for key, value in values.items():
            if key not in self._values:
                self._values[key] = value
                if key in notes:
                    self._notes[key] = notes[key]

    def _append(self, path: Path, line: bytes) -> None:
        if self._descriptor is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with _locked(self._descriptor):
            if os.fstat(self._descriptor).st_size:
                os.lseek(self._descriptor, -1, os.SEEK_END)
                if os.read(self._descriptor, 1) != b"\n":  # another process was killed here
                    line = b"\n" + line
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    def _read(self, path: Path) -> None:
        damaged = []
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    name, values, calls, seconds, notes = _parsed(line)
                except (ValueError, TypeError, KeyError, AttributeError):
                    damaged.append(number)
                    continue
                self._take(values, notes)
                before = self.spent(name)
                self._spent[name] = (before[0] + calls, before[1] + seconds)
        if damaged:
            shown = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
            log.warning(
                "%s: %d damaged lines (%s) are skipped, and their rewards asked for again", path, len(damaged), shown
            )


def _parsed(line: bytes) -> tuple[str, dict[str, float], int, float, dict[str, str]]:
    """Return a line's reward, values, calls, seconds, notes; raises various errors if damaged."""
    content = json.loads(line)
    values = {str(key): float(value) for key, value in content["values"].items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise ValueError("a value is not finite")
    notes = {str(key): str(note) for key, note in content.get("notes", {}).items()}
    return str(content["reward"]), values, int(content["calls"]), float(content["seconds"]), notes


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Hold the file against other processes; file systems without locks go without."""
    if fcntl is None:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
