"""Put the files of a DICOM series, one folder with a slice a file, into the order of their places.

As in `nifti_slices`: axial slices from the feet up, coronal ones from back to front, sagittal ones
from the patient's left to the right. Without places, InstanceNumber decides. Messages name neither
file nor identifier: either may be a patient's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import dcmread

from rlmed.core.files.litter import sift
from rlmed.data.images import BadImageError
from rlmed.data.readers.volumes.dicom_file import BoundedStream, dicom_damage_reported

SAME_PLACE = 1e-3
"""Millimetres; slices closer than this lie at the same place."""
SAME_DIRECTION = 1e-2
"""Largest difference of direction cosines between the slices of a volume."""
_ELEMENTS = ["SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "Rows"]
_TOWARDS = (-1, -1, 1)
"""Direction of counting along the patient's axes, which run to the left, to the back and up."""


@dataclass(frozen=True, slots=True)
class _Slice:
    path: Path
    series: str
    number: int | None
    """InstanceNumber."""
    position: np.ndarray | None
    """[3], in millimetres (PS3.3, C.7.6.2.1.1)."""
    directions: np.ndarray | None
    """[6]: direction cosines of rows, then of columns."""


def series_files(folder: Path, root: Path) -> tuple[Path, ...]:
    """Return the files of the series in a folder, in order; subfolders are ignored.

    Args:
        folder: holds one series; DICOMDIR and files that systems leave are ignored.
        root: files that a link puts outside it are refused.

    Raises:
        BadImageError: for a folder without a series, with several, or with other files; or if the
            order is unknown. Says how many, and names none.
    """
    paths, _ = sift((path for path in folder.iterdir() if path.is_file() and path.name.upper() != "DICOMDIR"), folder)
    if not paths:
        raise BadImageError("it is a folder without files: give a DICOM file, or the folder of a series")
    outside = sum(not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)) for path in paths)
    if outside:
        raise BadImageError(f"{outside} of the {len(paths)} files of its folder are links that leave the source's")
    slices = [found for path in paths if (found := _read_place(path)) is not None]
    if len(slices) < len(paths):
        raise BadImageError(
            f"{len(paths) - len(slices)} of the {len(paths)} files of its folder are no DICOM images: take them out"
        )
    if (series := len({entry.series for entry in slices})) > 1:
        raise BadImageError(f"its folder holds {series} series (SeriesInstanceUID): put each into a folder of its own")
    return tuple(slices[index].path for index in _order(slices))


def by_series(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Return DICOM images of one frame parted by their series, each in the order of its places.

    Raises:
        BadImageError: for a file that is no DICOM image, or a series whose order is unknown.
    """
    series: dict[str, list[_Slice]] = {}
    for path in paths:
        found = _read_place(path)
        if found is None:
            raise BadImageError("one of the files is no DICOM image: take it out")
        series.setdefault(found.series or str(path), []).append(found)
    return [tuple(slices[index].path for index in _order(slices)) for slices in series.values()]


def _read_place(path: Path) -> _Slice | None:
    """Read where a slice lies; None for a file that is not a DICOM image."""
    try:
        with dicom_damage_reported(), BoundedStream(path) as stream:
            dataset = dcmread(stream, force=True, stop_before_pixels=True, specific_tags=list(_ELEMENTS))
            if dataset.get("Rows") is None:
                return None
            number = dataset.get("InstanceNumber")
            return _Slice(
                path,
                str(dataset.get("SeriesInstanceUID") or ""),
                None if number in (None, "") else int(number),
                _vector(dataset.get("ImagePositionPatient"), 3),
                _vector(dataset.get("ImageOrientationPatient"), 6),
            )
    except BadImageError:
        return None


def _vector(value: object, length: int) -> np.ndarray | None:
    numbers = np.asarray(value if value is not None else [], dtype=np.float64).ravel()
    return numbers if len(numbers) == length and np.isfinite(numbers).all() else None


def _order(slices: Sequence[_Slice]) -> list[int]:
    if len(slices) == 1:
        return [0]
    places = _places(slices)
    if places is not None:
        order = np.argsort(places, kind="stable")
        close = int((np.diff(places[order]) < SAME_PLACE).sum())
        if close:
            raise BadImageError(
                f"{close} of the {len(slices)} files of its folder lie where another one does (ImagePositionPatient): put "
                "each time point or echo into a folder of its own"
            )
        return [int(index) for index in order]
    numbers = [entry.number for entry in slices if entry.number is not None]
    if len(set(numbers)) < len(slices):
        raise BadImageError(
            f"the order of the {len(slices)} files of its folder is unknown: they neither state where they all lie "
            "(ImagePositionPatient, in one orientation) nor each an InstanceNumber of its own"
        )
    return sorted(range(len(slices)), key=numbers.__getitem__)


def _places(slices: Sequence[_Slice]) -> np.ndarray | None:
    """Return how far along their normal the slices lie; None if they are not parallel or not known.

    The normal points in the direction of counting along the axis that it is closest to.
    """
    positions = [entry.position for entry in slices if entry.position is not None]
    directions = [entry.directions for entry in slices if entry.directions is not None]
    if len(positions) < len(slices) or len(directions) < len(slices):
        return None
    if np.ptp(directions, axis=0).max() > SAME_DIRECTION:
        return None
    normal = np.cross(directions[0][:3], directions[0][3:])
    axis = int(np.abs(normal).argmax())
    places: np.ndarray = np.stack(positions) @ (normal * np.sign(normal[axis]) * _TOWARDS[axis])
    return places
