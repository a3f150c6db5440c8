"""Uploaded pictures, DICOM files and NIfTI volumes: what can be chosen of each, and the picture.

No text of a header but numbers and the modality is given on: any other may be a patient's.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rlmed.data.images import BadImageError, check_encoded, load_image
from rlmed.data.readers.base import INSTALL
from rlmed.data.readers.volumes.dicom import without_local_dl
from rlmed.data.readers.volumes.display import Window, percentile_range

if TYPE_CHECKING:
    from rlmed.data.readers.volumes.dicom_file import DicomHeader
    from rlmed.data.readers.volumes.nifti_slices import SliceChoice

HOUNSFIELD: Mapping[str, Window] = {
    "soft tissue": Window(40, 400),
    "lung": Window(-600, 1500),
    "bone": Window(400, 1800),
    "brain": Window(40, 80),
}
"""Usual windows of CT, in Hounsfield units."""
OWN, PERCENTILES, RANGE, CUSTOM = "own", "percentiles", "range", "custom"
"""Names of the other windows: the file's first (then own-2, …), most of the values, all of them,
and one given as numbers.
"""
AIR = -500
"""A slice with values below may be CT in Hounsfield units, where the file does not say."""
_GZIP, _ZIP, _RAR = b"\x1f\x8b", b"PK\x03\x04", b"Rar!"
_NIFTI = {344: (b"n+1\0", b"ni1\0"), 4: (b"n+2\0", b"ni2\0")}
_HEAD = 600
_NOT_READ = "it is neither a picture (PNG, JPEG, TIFF, …) nor a DICOM or NIfTI file that can be read"
_BURNT = "The file states that text is burnt into its pixels, which may name a patient."
_SIDES = "The file does not state its orientation: left and right may be swapped."


@dataclass(frozen=True, slots=True)
class View:
    """What to show of a source.

    Example:
        View(plane="axial", index=17, window="custom", center=40.0, width=400.0)
    """

    plane: str = ""
    """Of a NIfTI volume."""
    index: int = 0
    """Of the slice or frame, from 0."""
    volume: int = 0
    """Of a NIfTI file with several."""
    window: str = ""
    """Name of one of the source's windows; "" for its first."""
    center: float = 0.0
    """With `width`, of the window `custom`."""
    width: float = 0.0

    def custom(self) -> Window:
        """Return the window given as numbers; raises ValueError for no window."""
        return Window(self.center, self.width)


class Source(ABC):
    """An uploaded picture or stack of slices."""

    files: tuple[Path, ...]
    """Its files, in the order of slices."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what can be chosen, in JSON's types.

        Returns:
            "kind"; "planes": slices by plane; "volumes"; "windows": name and label each; "modality"
            or ""; "notes".

        Raises:
            BadImageError: for a file that cannot be used.
        """

    @abstractmethod
    def picture(self, view: View) -> Image.Image:
        """Return the picture of a view.

        Raises:
            BadImageError: if it cannot be shown, or does not exist.
            ValueError: for an invalid window.
        """

    def file(self, view: View) -> Path | None:
        """Return a file that is the picture of a view as it is; None if there is none."""
        return None


class Picture(Source):
    """A picture file."""

    def __init__(self, path: Path) -> None:
        """Take a file that has been checked."""
        self.files = (path,)

    def describe(self) -> dict[str, Any]:
        """Return that there is nothing to choose."""
        return _described("picture", {"": 1}, [])

    def picture(self, view: View) -> Image.Image:
        """Return the picture as a model is shown it."""
        return load_image(self.files[0])

    def file(self, view: View) -> Path:
        """Return the file."""
        return self.files[0]


class DicomStack(Source):
    """Files of a series, in the order of their places, or the frames of one file."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Take the files of a series, or one file."""
        self.files = tuple(paths)
        self._headers: dict[Path, DicomHeader] = {}

    def describe(self) -> dict[str, Any]:
        """Return the slices and windows, by the middle slice."""
        _, header, frame = self._place(self._count() // 2)
        notes = [_BURNT] if header.burned_in else []
        return _described("DICOM", {"": self._count()}, self._windows(header, frame), header.modality, notes)

    def picture(self, view: View) -> Image.Image:
        """Return the picture of a slice or frame."""
        from rlmed.data.readers.volumes.dicom_pixels import render_frame

        path, header, frame = self._place(view.index)
        return render_frame(path, header, frame, self._window(path, header, frame, view))

    def _count(self) -> int:
        return len(self.files) if len(self.files) > 1 else self._header(self.files[0]).pixels.frames

    def _place(self, index: int) -> tuple[Path, DicomHeader, int]:
        """Return the file, its header and the frame of a slice."""
        if not 0 <= index < self._count():
            raise BadImageError(f"there is no slice {index + 1}: choose one from 1 to {self._count()}")
        several = len(self.files) > 1
        path = self.files[index if several else 0]
        return path, self._header(path), 0 if several else index

    def _header(self, path: Path) -> DicomHeader:
        from rlmed.data.readers.volumes.dicom_file import read_header

        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]

    def _windows(self, header: DicomHeader, frame: int) -> list[tuple[str, str]]:
        """Return names and labels, the default first."""
        from rlmed.data.readers.volumes.dicom_agreement import GREYS
        from rlmed.data.readers.volumes.dicom_file import frame_dataset
        from rlmed.data.readers.volumes.dicom_pixels import own_windows

        if header.pixels.photometric not in GREYS:
            return []
        own = [f"the file's ({_shown(window)})" for window in own_windows(header, frame)]
        if frame_dataset(header, frame).get("VOILUTSequence"):
            own = ["the file's look-up table", *own]
        named = [(OWN if number == 1 else f"{OWN}-{number}", label) for number, label in enumerate(own, 1)]
        return [*named, *_general(hounsfield=header.modality == "CT")]

    def _window(self, path: Path, header: DicomHeader, frame: int, view: View) -> Window | None:
        """Return the window of a view; None for the file's first, or its look-up table."""
        from rlmed.data.readers.volumes.dicom_file import frame_dataset
        from rlmed.data.readers.volumes.dicom_pixels import grey_values, own_windows

        windows = self._windows(header, frame)
        if not windows or view.window in ("", OWN):
            return None
        if view.window in (RANGE, PERCENTILES):
            low, high = _range(grey_values(path, header, frame), view.window)
            # the standard's linear window of centre c and width w shows c - 0.5 - (w - 1) / 2 black
            return Window((low + high) / 2 + 0.5, high - low + 1)
        if view.window.startswith(f"{OWN}-"):
            own = own_windows(header, frame)
            number = (
                int(view.window.removeprefix(f"{OWN}-")) - 1 - bool(frame_dataset(header, frame).get("VOILUTSequence"))
            )
            return own[number] if 0 <= number < len(own) else None
        return _named(view)


class NiftiVolume(Source):
    """A NIfTI file with one volume or several."""

    def __init__(self, path: Path) -> None:
        """Take a file that is not compressed."""
        self.files = (path,)

    def describe(self) -> dict[str, Any]:
        """Return slices by plane and windows, by the middle axial slice."""
        unknown, counts = self._counts()
        volumes = counts.pop("volumes")
        values = self._values(View("axial", counts["axial"] // 2))
        windows = _general(hounsfield=bool(values.size) and float(values.min()) < AIR)
        return _described("NIfTI", counts, windows, "", [_SIDES] if unknown else [], volumes)

    def picture(self, view: View) -> Image.Image:
        """Return the picture of a slice, in radiological orientation."""
        from rlmed.data.readers.volumes.nifti_slices import render_slice

        window = None
        if view.window == RANGE:
            low, high = _range(self._values(view), RANGE)
            window = Window((low + high) / 2, (high - low) or 1.0)
        elif view.window not in ("", PERCENTILES):
            window = _named(view)
        choice = dataclasses.replace(self._choice(view), window=window)
        return render_slice(self.files[0], choice, allow_unknown_orientation=self._counts()[0])

    def _values(self, view: View) -> np.ndarray:
        from rlmed.data.readers.volumes.nifti_slices import slice_values

        return slice_values(self.files[0], self._choice(view), allow_unknown_orientation=self._counts()[0])

    def _choice(self, view: View) -> SliceChoice:
        from rlmed.data.readers.volumes.nifti_slices import AXES, SliceChoice

        if view.plane not in AXES:
            raise BadImageError(f"its plane must be one of {', '.join(AXES)}")
        return SliceChoice(view.plane, index=view.index, volume=view.volume)

    def _counts(self) -> tuple[bool, dict[str, int]]:
        """Return whether the orientation is unknown, and slices by plane with the volumes."""
        from rlmed.data.readers.volumes.nifti_slices import slice_counts

        try:
            return False, slice_counts(self.files[0])
        except BadImageError:
            # nothing else may be wrong with it, or the same is said again
            return True, slice_counts(self.files[0], allow_unknown_orientation=True)


def kind_of(path: Path) -> str:
    """Return "nifti", "gzip", "dicom" or "picture", by the first bytes of a file.

    Raises:
        BadImageError: for an empty file or an archive.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise BadImageError("it is empty: copy it again")
    if head.startswith((_ZIP, _RAR)):
        raise BadImageError("it is an archive: unpack it, and choose the files in it")
    if head.startswith(_GZIP):
        return "gzip"
    if any(head[place : place + 4] in magic for place, magic in _NIFTI.items()):
        return "nifti"
    return "dicom" if head[128:132] == b"DICM" else "picture"


def open_picture(path: Path) -> Source:
    """Return a picture file as a source, or a DICOM file without a preamble.

    Raises:
        BadImageError: for neither.
    """
    try:
        check_encoded(path.read_bytes(), "")
    except BadImageError as error:
        said = str(error).removeprefix("image  ")
        if "is not an image" not in said:
            raise BadImageError(f"it {said}") from None
        try:
            dicom_frames(path)
        except ValueError:
            raise BadImageError(_NOT_READ) from None
        return DicomStack([path])
    return Picture(path)


def dicom_frames(path: Path) -> int:
    """Return how many frames a DICOM file has.

    Raises:
        BadImageError: for a file that cannot be used.
        ValueError: if pydicom is not installed.
    """
    try:
        with without_local_dl():
            from rlmed.data.readers.volumes.dicom_file import read_header
    except ImportError as error:
        raise ValueError(f"DICOM needs pydicom: {INSTALL}") from error
    return read_header(path).pixels.frames


def open_series(paths: Sequence[Path]) -> list[DicomStack]:
    """Return DICOM files of one frame as sources, one for each series.

    Raises:
        BadImageError: for a series whose order is unknown.
    """
    from rlmed.data.readers.volumes.dicom_series import by_series

    return [DicomStack(files) for files in by_series(paths)]


def open_nifti(path: Path) -> Source:
    """Return a NIfTI file, not compressed, as a source.

    Raises:
        ValueError: if nibabel is not installed.
    """
    try:
        import rlmed.data.readers.volumes.nifti_slices  # noqa: F401  (fails here, not at the first slice)
    except ImportError as error:
        raise ValueError(f"NIfTI needs nibabel: {INSTALL}") from error
    return NiftiVolume(path)


def _described(
    kind: str,
    planes: Mapping[str, int],
    windows: Sequence[tuple[str, str]],
    modality: str = "",
    notes: Sequence[str] = (),
    volumes: int = 1,
) -> dict[str, Any]:
    listed = [{"name": name, "label": label, **_numbers(name)} for name, label in windows]
    return {
        "kind": kind,
        "planes": dict(planes),
        "volumes": volumes,
        "windows": listed,
        "modality": modality,
        "notes": list(notes),
    }


def _general(*, hounsfield: bool) -> list[tuple[str, str]]:
    """Return the windows that any file has, and those of CT if its values are in that unit."""
    named = [(name, f"{name} ({_shown(window)} HU)") for name, window in HOUNSFIELD.items()] if hounsfield else []
    return [(PERCENTILES, "0.5 to 99.5 % of the values"), (RANGE, "all values"), *named, (CUSTOM, "center and width")]


def _numbers(name: str) -> dict[str, float]:
    window = HOUNSFIELD.get(name)
    return {} if window is None else {"center": window.center, "width": window.width}


def _shown(window: Window) -> str:
    return f"{window.center:g}, {window.width:g}"


def _named(view: View) -> Window:
    """Return a window of CT by its name, or the one given as numbers."""
    return HOUNSFIELD.get(view.window) or view.custom()


def _range(values: np.ndarray, window: str) -> tuple[float, float]:
    """Return the edges of what is shown."""
    if not values.size:
        return 0.0, 0.0
    return (float(values.min()), float(values.max())) if window == RANGE else percentile_range(values)
