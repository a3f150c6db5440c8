"""Append-only JSON Lines files; no partial line survives a full disk, a kill or a resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmed.core.files.atomic import RecordError, refusal

GO_ON = "start again with resume=auto; earlier lines are intact"


class JsonLinesWriter:
    """Append objects to a file, created on first use.

    Every line reaches the operating system before `append` returns, so a killed process loses none
    of them.

    Example:
        >>> writer = JsonLinesWriter(Path("metrics.jsonl"))
        >>> writer.append({"step": 1, "kl": float("nan")})
        >>> Path("metrics.jsonl").read_text().splitlines()
        ['{"step": 1, "kl": null}']
    """

    def __init__(self, path: Path) -> None:
        """Set the path; the first `append` opens the file, so it can be truncated until then."""
        self.path = path
        self._descriptor: int | None = None
        self._size = 0

    def append(self, content: Mapping[str, Any]) -> None:
        """Write one line; NaN and infinities become null.

        Raises:
            RecordError: if the write fails, for example on a full disk; the file then ends with its
                last whole line.
        """
        line = json.dumps(finite(content), ensure_ascii=False, allow_nan=False) + "\n"
        rest = memoryview(line.encode("utf-8", errors="replace"))
        total = len(rest)
        try:
            descriptor = self._open()
            while rest:  # a nearly full disk accepts only a part
                rest = rest[os.write(descriptor, rest) :]
        except OSError as error:
            self._cut_half_line()
            raise refusal(self.path, error, advice=GO_ON) from error
        self._size += total

    def offset(self) -> int:
        """Sync the file to disk and return its length in bytes; 0 if it does not exist."""
        if not self.path.exists():
            return 0
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def truncate(self, offset: int) -> None:
        """Truncate the file to an earlier `offset`.

        Raises:
            RecordError: see `check`.
        """
        self.check(offset)
        self.close()
        if self.path.exists():
            os.truncate(self.path, offset)

    def check(self, offset: int) -> None:
        """Check that `truncate(offset)` is possible.

        Raises:
            RecordError: if the file is shorter than `offset`, that is, lines were lost.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < offset:
            raise RecordError(
                f"{self.path} has {size} bytes, but {offset} when the checkpoint was saved: lines were removed. "
                "Restore the file, resume from an earlier checkpoint, or start a new run"
            )

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._size = whole_length(self.path)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._descriptor, self._size)  # drop the partial line of a killed run
        return self._descriptor

    def _cut_half_line(self) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, self._size)


def whole_length(path: Path) -> int:
    """Return the number of bytes up to the end of the last whole line; 0 without a file."""
    if not path.exists():
        return 0
    end = path.stat().st_size
    with path.open("rb") as file:
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, if it exists.

    An unterminated last line is still being written and is skipped.

    Raises:
        ValueError: for a line that is not a JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield parse_line(line, path, number)


def parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Parse a line of `path`.

    Raises:
        ValueError: if it is not a JSON object.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}): remove the line") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}, line {number} is not a JSON object: remove the line")
    return content


def finite(content: Any) -> Any:
    """Replace every NaN and infinity by None, recursively."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [finite(value) for value in content]
    return content
