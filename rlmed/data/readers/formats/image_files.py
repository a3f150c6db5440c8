"""Find images that a data set names by path: in a zip, or a folder perhaps laid out differently."""

from __future__ import annotations

import lzma
import os
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Protocol

from rlmed.core.files.litter import is_litter, walk_data
from rlmed.core.files.near_paths import Folder, Names, Near, near_path
from rlmed.data.examples import NEAR_ADVICE, BadRowError, path_inside, shorten
from rlmed.data.images import BadImageError
from rlmed.data.readers.base import Encoded

MAX_MEMBER_BYTES = 2**26
"""Most bytes unpacked of a file in an archive, whatever its header says."""


_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, ValueError)
"""What zipfile and its decompressors raise for damaged archives."""


class Images(Protocol):
    """A place to look for images."""

    def find(self, text: str) -> Path | Encoded:
        """Return the file that a row calls `text`. Raises BadRowError."""


def open_images(path: Path, *, search: bool = True) -> Images:
    """Open the images of a folder or zip; `search` also finds files elsewhere below a folder.

    Raises:
        ValueError: if it is neither.
    """
    if path.is_dir():
        return ImageFolder(path, search=search)
    if path.suffix.lower() == ".zip":
        return ImageArchive(path)
    advice = near_path(path) or "copy them there, or name them with --images"
    raise ValueError(f"images {path} are neither a folder nor a .zip: {advice}")


def images_of(given: Path | None, default: Path) -> Images:
    """Open the images that --images names, searching by file name too, or else those of `default`.

    Raises:
        ValueError: if that is neither a folder nor a zip archive.
    """
    return open_images(default, search=False) if given is None else open_images(given)


class ImageFolder:
    """Images below a folder, by a row's path or, with `search` if that is missing, by file name."""

    def __init__(self, folder: Path, *, search: bool = True) -> None:
        """Defer reading the folder."""
        self._folder, self._search = Folder(folder), search
        self._by_name: dict[str, list[str]] | None = None

    def find(self, text: str) -> Path:
        """Return the file that a row calls `text`.

        Raises:
            BadRowError: if it is not found, the name is ambiguous, or the path leaves the folder.
        """
        path = path_inside(text, self._folder)
        if os.path.isfile(path):  # not Path.is_file, which raises for an overlong name
            return path
        named = self._index().get(_composed_name(path.name), []) if self._search else []
        return path_inside(_only(text, named, self._folder.near), self._folder)

    def _index(self) -> dict[str, list[str]]:
        """Return relative paths by file name."""
        if self._by_name is None:
            self._by_name = {}
            for folder, _, names in walk_data(self._folder.root):
                for name in names:
                    path = os.path.relpath(os.path.join(folder, name), self._folder.root)
                    self._by_name.setdefault(_composed_name(name), []).append(path)
        return self._by_name


class ImageArchive:
    """Images of a zip archive, read one at a time; unpacks nothing to disk under its names."""

    def __init__(self, path: Path) -> None:
        """Read the archive's table of contents.

        Raises:
            ValueError: if it is not a zip archive.
        """
        try:
            self._archive = zipfile.ZipFile(path)
        except (*_DAMAGE, NotImplementedError) as error:  # the latter for an unknown version of the format
            raise ValueError(f"archive {path} cannot be read ({error}): copy it again") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._by_name: dict[str, list[str]] = {}
        """Return paths by the composed form of their last component."""
        self._names: Names | None = None
        for member in self._archive.infolist():
            if member.is_dir():
                continue
            self._members[member.filename] = member
            if not is_litter(member.filename):
                self._by_name.setdefault(_composed_name(member.filename), []).append(member.filename)

    def find(self, text: str) -> Encoded:
        """Return the member that a row calls `text`.

        Raises:
            BadRowError: if it is not found or the name is ambiguous.
        """
        if text in self._members:
            name = text
        else:
            name = _only(text.removeprefix("./"), self._by_name.get(_composed_name(text), []), self._near)
        return Encoded(name=name, load=lambda: self._content(name), key=name)

    def _near(self, text: str) -> Near | None:
        if self._names is None:
            self._names = Names(name for names in self._by_name.values() for name in names)
        return self._names.near(text)

    def _content(self, name: str) -> bytes:
        try:
            with self._archive.open(self._members[name]) as stream:
                content = stream.read(MAX_MEMBER_BYTES + 1)
        except _DAMAGE as error:
            raise BadImageError(f"image {name} in the archive is damaged ({error}): copy the archive again") from error
        except (RuntimeError, NotImplementedError) as error:  # a password, an unknown compression
            raise BadImageError(f"image {name} in the archive cannot be unpacked: {error}") from error
        if len(content) > MAX_MEMBER_BYTES:
            raise BadImageError(f"image {name} in the archive unpacks to more than {MAX_MEMBER_BYTES} bytes")
        return content


def _composed(path: str) -> str:
    """Normalize a path to slashes and composed accents.

    Some archives use backslashes, and macOS decomposes accents.
    """
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


def _composed_name(path: str) -> str:
    return PurePosixPath(_composed(path)).name


def _only(text: str, named: list[str], near: Callable[[str], Near | None]) -> str:
    """Return the only path with the file name, or the only one that ends with all of `text`."""
    end = f"/{_composed(text)}"
    found = [path for path in named if f"/{_composed(path)}".endswith(end)] or named
    found = [path for path in found if f"/{_composed(path)}" == end] or found
    if len(found) > 1:
        raise BadRowError(
            f"its image {shorten(text)} is not there, and {len(found)} files have its name: give --images"
        )
    if not found:
        hint = near(text)
        advice = f"{hint}; {NEAR_ADVICE}" if hint else "copy it there, or name its folder with --images"
        raise BadRowError(f"its image {shorten(text)} does not exist: {advice}")
    return found[0]
