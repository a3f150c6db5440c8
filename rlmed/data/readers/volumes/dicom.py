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
from rlmed.data.readers.volumes.picture_table import (
    TABLE_OPTIONS,
    PictureChoice,
    TableOptions,
    cell_number,
    cell_window,
    read_picture_table,
)

HEADERS_KEPT = 8
"""Headers cached for further rows about the same file."""


def read(
    source: Path,
    *,
    window: Sequence[float] | None = None,
    allow_burned_in: bool = False,
    **table: Unpack[TableOptions],
) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of the table, each with the frame that it asks about.

    Args:
        source: folder of the files.
        window: centre and width for rows that state none; None leaves it to the file.
        allow_burned_in: read files that state that text is burnt into their pixels.
        table: see `read_picture_table`; columns are file, question, options and answer, and
            optionally frame (from 1; blank for the middle one) and window ("CENTER WIDTH").

    Raises:
        ValueError: for an unreadable source or table, an invalid window, or if pydicom is not
            installed.
    """
    try:
        with _without_local_dl():
            from rlmed.data.readers.volumes.dicom_file import read_header
            from rlmed.data.readers.volumes.dicom_pixels import render_frame
    except ImportError as error:
        raise ValueError(f"the reader dicom needs pydicom: {INSTALL}") from error
    cell_window({}, window)  # fail before reading anything
    cached_header = lru_cache(maxsize=HEADERS_KEPT)(read_header)

    def choose(path: Path, cells: Mapping[str, str]) -> PictureChoice:
        header = cached_header(path)
        if header.burned_in and not allow_burned_in:
            raise BadImageError(
                "it states that text is burnt into its pixels (BurnedInAnnotation), which may be a patient's name: look at "
                "it, and allow such files with --allow-burned-in"
            )
        frame = header.frame_index(cell_number(cells, "frame"))
        shown = cell_window(cells, window)
        return PictureChoice((frame, shown), partial(render_frame, path, header, frame, shown), header.modality)

    yield from read_picture_table(source, choose, ("frame", "window"), **table)


@contextmanager
def _without_local_dl() -> Iterator[None]:
    """Hide any folder `dl`: GDCM, which pydicom imports, tries Python 2's `import dl`."""
    sys.modules.setdefault("dl", None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if sys.modules["dl"] is None:
            del sys.modules["dl"]


READER = Reader(
    name="dicom",
    title="DICOM files and a table of questions about them",
    read=read,
    options=(
        *TABLE_OPTIONS,
        Option(
            "--allow-burned-in",
            {"action": "store_true", "help": "read files that state that text is burnt into their pixels"},
        ),
    ),
    private=True,
)
