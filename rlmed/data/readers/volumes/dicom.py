"""Read DICOM files and a question table; docs/data.md lists columns and how pixels are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Unpack

from rlmed.data.images import BadImageError
from rlmed.data.readers.base import INSTALL, Option, Reader, Skipped, SourceRow
from rlmed.data.readers.volumes.display import Window
from rlmed.data.readers.volumes.picture_table import (
    Choose,
    FileKind,
    PictureChoice,
    TableOptions,
    cell_number,
    cell_window,
    folder_of,
    read_picture_table,
    table_options,
)
from rlmed.data.readers.volumes.slices import Slices, cell_slices, given_slices

KIND = FileKind("a DICOM file", ("frame", "slices", "window"))
HEADERS_KEPT = 8
"""Headers cached for further rows about the same file."""
BURNED_IN = (
    "it states that text is burnt into its pixels (BurnedInAnnotation), which may be a patient's name: look at it, and "
    "allow such files with --allow-burned-in"
)
SERIES_KEPT = 64
"""Orders of a folder's files cached for further rows about the same series."""


def read(
    source: Path,
    *,
    window: Sequence[float] | None = None,
    slices: str | None = None,
    allow_burned_in: bool = False,
    **table: Unpack[TableOptions],
) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of the table, each with the frames or slices that it asks about.

    Args:
        source: folder of the files, or the table in it.
        window: centre and width for rows that state none; None leaves it to the file.
        slices: for rows that state none, as `parse_slices` takes them; None shows one.
        allow_burned_in: read files that state that text is burnt into their pixels.
        table: see `read_picture_table`; columns are file (or the folder of a series), question,
            options and answer, and optionally frame (or slice of a series, from 1; blank for the
            middle one), slices in its place, and window ("CENTER WIDTH").

    Raises:
        ValueError: for an unreadable source or table, an invalid window or invalid slices, or if
            pydicom is not installed.
    """
    choose = chooser(folder_of(source), window, slices, allow_burned_in=allow_burned_in)
    yield from read_picture_table(source, choose, KIND.columns, folders=True, **table)


def chooser(folder: Path, window: Sequence[float] | None, slices: str | None, *, allow_burned_in: bool) -> Choose:
    """Return what finds the pictures of a row in its DICOM file, or in its folder with a series.

    Args:
        folder: the source's; links that leave it are refused.
        window: as in `read`.
        slices: as in `read`.
        allow_burned_in: as in `read`.

    Raises:
        ValueError: for an invalid window or invalid slices, or if pydicom is not installed.
    """
    try:
        with without_local_dl():
            from rlmed.data.readers.volumes.dicom_file import read_header
            from rlmed.data.readers.volumes.dicom_pixels import render_frame
            from rlmed.data.readers.volumes.dicom_series import series_files
    except ImportError as error:
        raise ValueError(f"the reader dicom needs pydicom: {INSTALL}") from error
    cell_window({}, window)  # fail before reading anything
    default = given_slices(slices)
    cached_header = lru_cache(maxsize=HEADERS_KEPT)(read_header)
    cached_series = lru_cache(maxsize=SERIES_KEPT)(series_files)

    def picture(file: Path, frame: int | None, shown: Window | None, name: str = "") -> PictureChoice:
        header = cached_header(file)
        if frame is None and header.pixels.frames > 1:
            raise BadImageError(f"{name} of its folder has {header.pixels.frames} frames: name its file in the table")
        if header.burned_in and not allow_burned_in:
            raise BadImageError(BURNED_IN)
        load = partial(render_frame, file, header, frame or 0, shown)
        return PictureChoice((frame or 0, shown), load, header.modality, file, name, KIND)

    def choose(path: Path, cells: Mapping[str, str]) -> list[PictureChoice]:
        shown, number = cell_window(cells, window), cell_number(cells, "frame")
        wanted = cell_slices(cells, default, ("frame",))
        if not path.is_dir():
            header = cached_header(path)
            if wanted is None:
                return [picture(path, header.frame_index(number), shown)]
            chosen = wanted.indices(header.pixels.frames, first=1, kind="frame")
            return [picture(path, frame, shown, f"frame {frame + 1}") for frame in chosen]
        files = cached_series(path, folder)
        wanted = wanted or Slices(1, () if number is None else (number,))
        chosen = wanted.indices(len(files), first=1, kind="slice")
        return [picture(files[index], None, shown, f"slice {index + 1}") for index in chosen]

    return choose


@contextmanager
def without_local_dl() -> Iterator[None]:
    """Hide any folder `dl`: GDCM, which pydicom imports, tries Python 2's `import dl`."""
    sys.modules.setdefault("dl", None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if sys.modules["dl"] is None:
            del sys.modules["dl"]


ALLOW_BURNED_IN = Option(
    "--allow-burned-in",
    {"action": "store_true", "help": "read DICOM files that state that text is burnt into their pixels"},
)
READER = Reader(
    name="dicom",
    title="DICOM files and a table of questions about them",
    read=read,
    options=(*table_options(KIND.columns), ALLOW_BURNED_IN),
    private=True,
)
