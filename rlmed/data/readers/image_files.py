"""Images that a data set names by path: in a folder that may be laid out in another way, or in a zip archive."""

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

from rlmed.core.litter import is_litter, walk_data
from rlmed.core.near_paths import Folder, Names, Near, near_path
from rlmed.data.images import BadImageError
from rlmed.data.jsonl import NEAR_CURE, BadRowError, path_inside, shorten
from rlmed.data.readers.base import Encoded

MAX_MEMBER_BYTES = 2**26
"""A file in an archive is not unpacked beyond this, whatever its header says."""


_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, ValueError)
"""What zipfile and the decompressors under it raise for damaged archives."""


class Images(Protocol):
    """Where images are looked for."""

    def find(self, text: str) -> Path | Encoded:
        """The file that a row calls `text`. Raises BadRowError."""


def open_images(path: Path, *, search: bool = True) -> Images:
    """The images of a folder or zip archive; with `search`, a file of a folder may lie elsewhere below it.

    Raises:
        ValueError: when it is neither.
    """
    if path.is_dir():
        return ImageFolder(path, search=search)
    if path.suffix.lower() == ".zip":
        return ImageArchive(path)
    cure = near_path(path) or "copy them there, or name them with --images"
    raise ValueError(f"images {path} are neither a folder nor a .zip: {cure}")


def images_of(given: Path | None, default: Path) -> Images:
    """The images that --images names, searched for by file name too; or those of `default`, which may hold anything else.

    Raises:
        ValueError: when that is neither a folder nor a zip archive.
    """
    return open_images(default, search=False) if given is None else open_images(given)


class ImageFolder:
    """The images below a folder: by the path that a row gives or, with `search`, by file name where nothing is there."""

    def __init__(self, folder: Path, *, search: bool = True) -> None:
        """Nothing is read yet."""
        self._folder, self._search = Folder(folder), search
        self._by_name: dict[str, list[str]] | None = None

    def find(self, text: str) -> Path:
        """The file that a row calls `text`.

        Raises:
            BadRowError: when there is none, there are several of that name, or the path leaves the folder.
        """
        path = path_inside(text, self._folder)
        if os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
            return path
        named = self._index().get(_composed_name(path.name), []) if self._search else []
        return path_inside(_only(text, named, self._folder.near), self._folder)

    def _index(self) -> dict[str, list[str]]:
        """Paths from the folder on, by file name."""
        if self._by_name is None:
            self._by_name = {}
            for folder, _, names in walk_data(self._folder.root):
                for name in names:
                    path = os.path.relpath(os.path.join(folder, name), self._folder.root)
                    self._by_name.setdefault(_composed_name(name), []).append(path)
        return self._by_name


class ImageArchive:
    """The images of a zip archive, read from it one at a time; nothing is unpacked to the disk under a name of the archive."""

    def __init__(self, path: Path) -> None:
        """Read the archive's table of contents.

        Raises:
            ValueError: when it is no zip archive.
        """
        try:
            self._archive = zipfile.ZipFile(path)
        except (*_DAMAGE, NotImplementedError) as error:  # the latter for a version of the format that it does not know
            raise ValueError(f"archive {path} cannot be read ({error}): copy it again") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._by_name: dict[str, list[str]] = {}
        """Paths by the composed form of their last name."""
        self._names: Names | None = None
        for member in self._archive.infolist():
            if member.is_dir():
                continue
            self._members[member.filename] = member
            if not is_litter(member.filename):
                self._by_name.setdefault(_composed_name(member.filename), []).append(member.filename)

    def find(self, text: str) -> Encoded:
        """The member that a row calls `text`.

        Raises:
            BadRowError: when there is none, or there are several of that name.
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
    """The path with slashes and composed accents: some archives have backslashes, and macOS writes accents apart."""
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


def _composed_name(path: str) -> str:
    return PurePosixPath(_composed(path)).name


def _only(text: str, named: list[str], near: Callable[[str], Near | None]) -> str:
    """The one of the paths with the right file name, or the one that ends with all of `text`."""
    end = f"/{_composed(text)}"
    found = [path for path in named if f"/{_composed(path)}".endswith(end)] or named
    found = [path for path in found if f"/{_composed(path)}" == end] or found
    if len(found) > 1:
        raise BadRowError(
            f"its image {shorten(text)} is not there, and {len(found)} files have its name: give --images"
        )
    if not found:
        hint = near(text)
        cure = f"{hint}; {NEAR_CURE}" if hint else "copy it there, or name its folder with --images"
        raise BadRowError(f"its image {shorten(text)} does not exist: {cure}")
    return found[0]
