"""Images that a data set names by path, found in a folder that may be laid out in another way."""

from __future__ import annotations

import os
from pathlib import Path

from rlmed.data.jsonl import BadRowError, path_inside, shorten


class ImageFolder:
    """The images below a folder: by the path that a row gives or, where nothing is there, by file name."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet.

        Raises:
            ValueError: when there is no such folder.
        """
        if not folder.is_dir():
            raise ValueError(
                f"image folder {folder} does not exist: copy the images there, or name it with --images DIR"
            )
        self._root = folder.resolve()
        self._by_name: dict[str, list[str]] | None = None

    def find(self, text: str) -> Path:
        """The file that a row calls `text`.

        Raises:
            BadRowError: when there is none, there are several of that name, or the path leaves the folder.
        """
        path = path_inside(text, self._root)
        if path.is_file():
            return path
        found = self._index().get(path.name, [])
        if len(found) > 1:
            raise BadRowError(
                f"its image {shorten(text)} is not there, and {len(found)} files have its name: give --images"
            )
        if not found:
            raise BadRowError(
                f"its image {shorten(text)} does not exist: copy it there, or name its folder with --images"
            )
        return path_inside(found[0], self._root)

    def _index(self) -> dict[str, list[str]]:
        """Paths from the folder on, by file name."""
        if self._by_name is None:
            self._by_name = {}
            for folder, _, names in os.walk(self._root):  # links to folders are not followed
                for name in names:
                    self._by_name.setdefault(name, []).append(os.path.relpath(os.path.join(folder, name), self._root))
        return self._by_name
