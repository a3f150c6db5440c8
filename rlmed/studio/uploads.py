"""Files that a browser sends: kept in a temporary folder, under names of ours, within limits."""

from __future__ import annotations

import gzip
import secrets
import shutil
import tempfile
import threading
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from rlmed.data.images import BadImageError
from rlmed.studio.volumes import DicomStack, Source, dicom_frames, kind_of, open_nifti, open_picture, open_series

MIB = 1 << 20
MOST_BYTES = 512 * MIB
"""Of one file; also of what a compressed volume inflates to, times `INFLATES`."""
INFLATES = 4
MOST_TOTAL = 2048 * MIB
"""Of all files, with what has come of those on their way; the oldest make room."""
MOST_FILES = 4096
MOST_OPENED = 2048
"""Most files of one choice."""
MOST_SOURCES = 2 * MOST_OPENED
"""Most sources that stay open; the oldest make room."""
_PIECE = 1 << 20


class Uploads:
    """The server's temporary folder, and what was opened of it.

    Its files are gone when the server ends.
    """

    def __init__(self, most_bytes: int = MOST_BYTES, most_total: int = MOST_TOTAL) -> None:
        """Set limits, in bytes; the folder is made for the first file."""
        self._most_bytes, self._most_total = most_bytes, most_total
        self._kept: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[str, int] = {}
        """Bytes by id, oldest first."""
        self._arriving: dict[str, int] = {}
        """Bytes that have come, by name, of files on their way or being inflated."""
        self._sources: dict[str, Source] = {}
        self._lock = threading.RLock()

    @property
    def folder(self) -> Path:
        """The folder, which no other user may read; made if need be."""
        with self._lock:
            if self._kept is None:
                self._kept = tempfile.TemporaryDirectory(prefix="rlmed-studio-", ignore_cleanup_errors=True)
            return Path(self._kept.name)

    def close(self) -> None:
        """Remove all files."""
        with self._lock:
            if self._kept is not None:
                self._kept.cleanup()
            self._files, self._sources = {}, {}

    async def receive(self, pieces: AsyncIterator[bytes], length: int | None = None) -> str:
        """Write a file as it arrives; return its id.

        Args:
            pieces: of the file.
            length: in bytes, as announced.

        Raises:
            BadImageError: for a file beyond the limit, which is removed.
        """
        name = secrets.token_hex(16)
        path, size = self.folder / name, 0
        try:
            if length is not None:
                self._check(length)
            with path.open("xb") as file:
                async for piece in pieces:
                    size += len(piece)
                    self._check(size)
                    self._grow(name, size)
                    file.write(piece)
            self._add(name, size)
        except BaseException:  # the client may go away
            path.unlink(missing_ok=True)
            raise
        finally:
            self._arriving.pop(name, None)
        return name

    def open(self, names: Sequence[str]) -> tuple[list[str], list[tuple[int, str]]]:
        """Open files: ids of sources, in order of their first file, and problems by file.

        Returns:
            Ids of sources; and pairs of a file's place among `names` and what is wrong with it.

        Raises:
            BadImageError: for an unknown file, or too many.
        """
        if not 0 < len(names) <= MOST_OPENED:
            raise BadImageError(f"{len(names)} files: choose 1 to {MOST_OPENED}")
        paths = [self._path(name) for name in names]
        opened: list[tuple[int, Source]] = []
        problems: list[tuple[int, str]] = []
        single: list[int] = []
        for place, path in enumerate(paths):
            try:
                kind = kind_of(path)
                if kind == "dicom" and dicom_frames(path) == 1:
                    single.append(place)
                else:
                    opened.append((place, self._open(path, kind)))
            except (ValueError, OSError) as error:
                problems.append((place, _said(error)))
        try:
            for stack in open_series([paths[place] for place in single]) if single else []:
                stack.describe()
                opened.append((min(place for place in single if paths[place] in stack.files), stack))
        except (ValueError, OSError) as error:
            problems.append((single[0], _said(error)))
        return [self._register(source) for _, source in sorted(opened, key=lambda one: one[0])], problems

    def source(self, name: str) -> Source:
        """Return an opened source.

        Raises:
            BadImageError: for one that is unknown, or had to make room.
        """
        with self._lock:
            if name not in self._sources:
                raise BadImageError("the file is no longer kept: choose it again")
            return self._sources[name]

    def _path(self, name: str) -> Path:
        with self._lock:
            if name not in self._files:  # so no path of a client's is ever opened
                raise BadImageError("the file is no longer kept: choose it again")
        return self.folder / name

    def _open(self, path: Path, kind: str) -> Source:
        """Open a file that is no slice of a series; a volume is inflated, to read slices alone."""
        if kind == "gzip":
            self._inflate(path)
            if kind_of(path) != "nifti":
                raise BadImageError("it is compressed, and no NIfTI file: unpack it, and choose what is in it")
            kind = "nifti"
        source = open_nifti(path) if kind == "nifti" else DicomStack([path]) if kind == "dicom" else open_picture(path)
        source.describe()
        return source

    def _inflate(self, path: Path) -> None:
        """Replace a compressed file by its content, up to the limit."""
        aside, size, most = path.with_suffix(".part"), 0, INFLATES * self._most_bytes
        try:
            with gzip.open(path) as packed, aside.open("xb") as file:
                while piece := packed.read(_PIECE):
                    size += len(piece)
                    if size > most:
                        raise BadImageError(
                            f"it inflates to more than {most // MIB} MiB: cut out the part that the question is about"
                        )
                    self._grow(aside.name, size)
                    file.write(piece)
            aside.replace(path)
            self._add(path.name, size)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise BadImageError("it is damaged or truncated: copy or export it again") from None
        finally:
            aside.unlink(missing_ok=True)
            self._arriving.pop(aside.name, None)

    def _check(self, size: int) -> None:
        if size > self._most_bytes:
            raise BadImageError(f"it has more than {self._most_bytes // MIB} MiB, which is the most: export it smaller")
        if size > shutil.disk_usage(self.folder).free:
            raise BadImageError("the server's disk is full: free some space")

    def _grow(self, name: str, size: int) -> None:
        """Note how much of a file has come; the oldest make room.

        Raises:
            BadImageError: if all that is on its way is beyond the limit.
        """
        with self._lock:
            self._arriving[name] = size
            self._make_room(keep=0)
            if sum(self._arriving.values()) > self._most_total:
                raise BadImageError("too many files come at the same time: send it again, after the others")

    def _add(self, name: str, size: int) -> None:
        """Note a file that is whole; the oldest make room."""
        with self._lock:
            for names in (self._files, self._arriving):
                names.pop(name, None)
            self._arriving.pop(f"{name}.part", None)
            self._files[name] = size
            self._make_room(keep=1)

    def _make_room(self, keep: int) -> None:
        """Remove the oldest files beyond the limits, but for some of the latest."""
        while len(self._files) > keep and (
            sum(self._files.values()) + sum(self._arriving.values()) > self._most_total
            or len(self._files) + len(self._arriving) > MOST_FILES
        ):
            oldest = next(iter(self._files))
            del self._files[oldest]
            gone = self.folder / oldest
            gone.unlink(missing_ok=True)
            self._sources = {key: one for key, one in self._sources.items() if gone not in one.files}

    def _register(self, source: Source) -> str:
        name = secrets.token_hex(16)
        with self._lock:
            self._sources[name] = source
            while len(self._sources) > MOST_SOURCES:
                del self._sources[next(iter(self._sources))]
        return name


def _said(error: ValueError | OSError) -> str:
    """Return what is wrong with a file, without its path on the server."""
    return f"it cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
