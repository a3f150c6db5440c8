"""Read a table of questions about files of any kind: pictures, DICOM files and series, NIfTI.

Each file is read as its own reader would; docs/data.md lists the columns. A picture is written anew
without what its file says besides pixels, which may name a patient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Unpack

from PIL import Image

from rlmed.data.images import BadImageError, is_picture, load_shown, volume_kind
from rlmed.data.readers.base import Reader, Skipped, SourceRow
from rlmed.data.readers.volumes import dicom, nifti
from rlmed.data.readers.volumes.picture_table import (
    Choose,
    FileKind,
    PictureChoice,
    TableOptions,
    cell_window,
    folder_of,
    read_picture_table,
    table_options,
)
from rlmed.data.readers.volumes.slices import given_slices

PICTURE = FileKind("a picture", ())
COLUMNS = tuple(dict.fromkeys((*dicom.KIND.columns, *nifti.KIND.columns)))
ENDINGS = {".dcm": "DICOM", ".ima": "DICOM", ".nii": "NIfTI", ".nii.gz": "NIfTI"}
"""Kind of a file that its content does not tell, since it is damaged."""
UNKNOWN = (
    "it is neither a picture (PNG, JPEG, TIFF, …) nor DICOM nor NIfTI, or its header is damaged: correct the path, or "
    "export it again"
)


def read(
    source: Path,
    *,
    window: Sequence[float] | None = None,
    slices: str | None = None,
    allow_burned_in: bool = False,
    allow_unknown_orientation: bool = False,
    **table: Unpack[TableOptions],
) -> Iterator[SourceRow | Skipped]:
    """Yield the rows of the table, each with the pictures that it asks about.

    Args:
        source: folder of the files, or the table in it.
        window: as of the readers `dicom` and `nifti`; pictures have none.
        slices: likewise.
        allow_burned_in: read DICOM files that state that text is burnt into their pixels.
        allow_unknown_orientation: read NIfTI files that do not state their orientation.
        table: see `read_picture_table`; columns are those of both readers.

    Raises:
        ValueError: for an unreadable source or table, an invalid window or invalid slices, or if
            the library of a file's kind is not installed.
    """
    cell_window({}, window)  # fail before reading anything
    given_slices(slices)

    @cache  # the libraries of a kind are needed once there is a file of it
    def chooser(kind: str) -> Choose:
        if kind == "NIfTI":
            return nifti.chooser(window, slices, allow_unknown_orientation=allow_unknown_orientation)
        return dicom.chooser(folder_of(source), window, slices, allow_burned_in=allow_burned_in)

    def choose(path: Path, cells: Mapping[str, str]) -> Sequence[PictureChoice]:
        kind = _kind(path)
        if kind == "picture":
            return [PictureChoice((), partial(_load, path), kind=PICTURE)]
        try:
            return chooser(kind or "DICOM")(path, cells)  # perhaps DICOM without its preamble
        except BadImageError:
            if kind:
                raise
            raise BadImageError(UNKNOWN) from None

    yield from read_picture_table(source, choose, COLUMNS, folders=True, **table)


def _kind(path: Path) -> str:
    """Return "picture", "DICOM" or "NIfTI"; "" if unknown.

    Raises:
        BadImageError: for a file that cannot be opened.
    """
    if path.is_dir():
        return "DICOM"
    try:
        with path.open("rb") as stream:
            if kind := volume_kind(stream) or "picture" * is_picture(stream):
                return kind
    except OSError as error:
        raise BadImageError(f"it cannot be read ({error.strerror}): correct the path or copy it again") from None
    return next((kind for ending, kind in ENDINGS.items() if path.name.lower().endswith(ending)), "")


def _load(path: Path) -> Image.Image:
    """Return a picture as a run shows it: grey in one band, without a file's name in messages."""
    try:
        picture = load_shown(path)
    except BadImageError as error:
        raise BadImageError(str(error).replace(f"image {path}", "it")) from None
    first, *others = picture.split()
    return first if all(band.tobytes() == first.tobytes() for band in others) else picture


READER = Reader(
    name="files",
    title="pictures, DICOM files and NIfTI volumes, mixed as you like, and a table of questions about them",
    read=read,
    options=(*table_options(COLUMNS), dicom.ALLOW_BURNED_IN, nifti.ALLOW_UNKNOWN_ORIENTATION),
    private=True,
)
