"""Read a JSON array or JSON Lines object by object: memory is that of a file's longest object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rlmed.core.files.near_paths import near_path
from rlmed.data.options.sources import unique_keys
from rlmed.data.rows import BadRowError

CHUNK = 2**20
"""Characters per read."""
MAX_OBJECT = 2**24
"""Most characters of one object; a longer one counts as damage."""
_BLANK = " \t\r\n"


def read_json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number from 0, value) per element; `BadRowError` as value if it has a repeated key.

    Args:
        path: UTF-8, with or without a byte-order mark; `[{…}, {…}]`, or `{…}` after `{…}` with
            white space between.

    Raises:
        ValueError: for a file that cannot be opened, is empty, not UTF-8 or not JSON; gives the
            element's number.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _elements(path, file)
    except OSError as error:
        near = near_path(path) or "give the path of a JSON file"
        raise ValueError(f"file {path} cannot be read: {error.strerror}; {near}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"file {path} is not UTF-8: save it as UTF-8") from error


def _elements(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    buffer = _Buffer(path, file)
    first = buffer.next_mark()
    if not first:
        raise ValueError(f"file {path} is empty: copy it again")
    array = first == "["
    if array:
        buffer.skip(1)
    number = 0
    while True:
        mark = buffer.next_mark()
        if not mark or (array and mark == "]"):
            break
        if number and array:
            if mark != ",":
                raise buffer.fault(number, f"{mark!r} instead of a comma")
            buffer.skip(1)
            buffer.next_mark()
        yield number, buffer.value(number)
        number += 1
    if array and not mark:
        raise buffer.fault(number, "the file ends before the array does")
    if array:
        buffer.skip(1)
        if buffer.next_mark():
            raise buffer.fault(number, "more text follows the end of the array")


class _Buffer:
    """Text read but not yet consumed."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._text, self._at = "", 0
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._repeated: list[BadRowError] = []
        """Defects of objects in the current value."""

    def next_mark(self) -> str:
        """Return the next character that is not blank; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, count: int) -> None:
        self._at += count

    def value(self, number: int) -> Any:
        """Return the value that starts here, reading until it is complete."""
        while True:
            self._repeated.clear()
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > MAX_OBJECT or not self._more():
                    raise self.fault(number, error.msg) from error
            except (ValueError, RecursionError) as error:  # thousands of digits, or brackets nested thousands deep
                raise self.fault(number, str(error)) from error
            else:
                # a number may continue beyond the text read so far, or be cut inside: -1.5e
                whole = isinstance(found, (dict, list, str)) or self._text[end : end + 1] in (*_BLANK, ",", "]")
                start = self._at
                if not whole and self._more():
                    continue
                if not whole:  # the end of the file
                    end -= start  # the buffer has been shifted
                    if self._text[end:]:
                        raise self.fault(number, f"{self._text[end]!r} after a number")
                self._at = end
                return self._repeated[0] if self._repeated else found

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # raising here would end the array: where the object ends is still unknown
        try:
            return unique_keys(pairs)
        except BadRowError as error:
            self._repeated.append(error)
            return dict(pairs)

    def fault(self, number: int, what: str) -> ValueError:
        return ValueError(f"file {self._path}, element {number}: not valid JSON ({what}); copy the file again")

    def _more(self) -> bool:
        """Read more text; return False at the end of the file."""
        chunk = self._file.read(CHUNK)
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)
