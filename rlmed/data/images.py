"""Read image files of any kind as 8-bit RGB pictures of a sensible size."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from rlmed.data.pixel_modes import (
    UnreadableModeError,
    check_mode,
    check_upper_bytes,
    extrema_of_band,
    is_halved,
    is_wide,
    meant,
    scaled_transparency,
)

MAX_SIDE = 2048
"""Reading scales longer sides down to this; most models see fewer pixels."""
MIN_SIDE = 4
"""Pixels; a smaller image counts as a defect of the file."""
MODEL_MIN_SIDE = 28
"""Reading scales sides up to at least this: one visual token of the Qwen2-VL family."""
MAX_ASPECT = 200
"""Longest aspect ratio that image processors of the Qwen2-VL family accept."""
MIN_CONTRAST = 2
"""Grey levels, of 255, between darkest and brightest pixel; a picture with fewer shows nothing."""
MAX_PIXELS = 170_000_000
"""Most pixels that are decoded (about 13,000 x 13,000), below Pillow's own limit."""
MAX_IMAGES = 64
"""Most images of one question; a prompt's length in tokens usually allows fewer."""
KEPT_BYTES = 512 * 2**20
"""Memory for pictures decoded by `check_image(keep=True)`: 2,000 grey, 680 colour of 512 x 512."""
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "JPEG2000")
"""Pillow formats that are read.

Others are refused: some of its readers (EPS) start other programs.
"""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPED = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}
"""Turns after which width and height have changed places."""
"""The transpose that undoes each EXIF orientation; 1 is upright."""

_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    ArithmeticError,
    TypeError,
    EOFError,
    struct.error,
    zlib.error,
)
"""What Pillow's readers raise for damaged files."""

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF files, in either byte order."""

# MAX_PIXELS replaces this warning. Process-wide: warnings.catch_warnings is not safe in the
# reader's threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImageError(ValueError):
    """An image file that cannot be used; the message names the file and what to do."""


_Version = tuple[Path, int, int, int]


class _KeptPictures:
    """Decoded pictures by file and version of the file, as many as fit in `KEPT_BYTES`.

    None is dropped for another: a run reads all its rows again and again in one order, and if they
    are a few too many, the most recent pictures would always be the wrong ones.
    """

    def __init__(self) -> None:
        self._pictures: dict[_Version, Image.Image] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, version: _Version) -> Image.Image | None:
        """Return a copy in RGB; None if the picture is not kept."""
        kept = self._pictures.get(version)
        return kept if kept is None else kept.copy() if kept.mode == "RGB" else kept.convert("RGB")

    @property
    def size(self) -> int:
        """Bytes in use."""
        return self._bytes

    def add(self, version: _Version, picture: Image.Image) -> None:
        """Keep an RGB picture if there is room; store grey ones as one band."""
        bands = picture.split()
        first, *others = (band.tobytes() for band in bands)
        grey = all(other == first for other in others)
        size = len(first) * (1 if grey else len(bands))
        with self._lock:
            if version not in self._pictures and self._bytes + size <= KEPT_BYTES:
                self._pictures[version] = bands[0] if grey else picture
                self._bytes += size


_KEPT = _KeptPictures()


def kept_bytes() -> int:
    """Return the memory that decoded pictures take, at most `KEPT_BYTES`."""
    return _KEPT.size


def load_image(path: Path, *, max_side: int = MAX_SIDE) -> Image.Image:
    """Read an image file as RGB; `check_image` may have kept the picture.

    Stretches signed grey values and those of more than 8 bits from the picture's own range to
    0..255, composites transparency on black (the surroundings of a radiograph), applies EXIF
    rotation and takes an animation's first frame. Both sides of the result are at least
    `MODEL_MIN_SIDE`, and the longer is at most `MAX_ASPECT` times the shorter.

    Args:
        path: a file in one of `FORMATS`, whatever its suffix.
        max_side: longer sides are scaled down to this (while decoding, for JPEG), unless the
            shorter would then be less than `MODEL_MIN_SIDE`.

    Raises:
        BadImageError: for a missing, empty, truncated, tiny, extremely elongated or gigantic image,
            a file that is not an image, or an unsupported kind of pixels.
    """
    return _load(path, max_side)[0]


def check_image(path: Path, *, keep: bool = False) -> None:
    """Check that an image file can be read and shows something.

    Args:
        path: the file.
        keep: keep the picture in memory for `load_image`, if there is room, so that it is decoded
            once.

    Raises:
        BadImageError: as `load_image`, and for a picture of a single colour.
    """
    load_shown(path, keep=keep)


def load_shown(path: Path, *, keep: bool = False) -> Image.Image:
    """Return the picture of an image file that shows something; the caller may change it.

    Raises:
        BadImageError: as `check_image`.
    """
    picture, cause = _load(path, MAX_SIDE, keep=keep)
    check_contrast(f"image {path}", picture, cause)
    return picture


def check_encoded(content: bytes, name: str) -> None:
    """Check an image file given as bytes; `name` is for messages."""
    picture, cause = _decode(io.BytesIO(content), name, MAX_SIDE)
    check_contrast(f"image {name}", picture, cause)


def check_contrast(what: str, picture: Image.Image, cause: str = "") -> None:
    """Check that a picture shows something.

    Args:
        what: its name in the message.
        picture: mode L or RGB.
        cause: why it may show nothing; "" makes the message name its colour.

    Raises:
        BadImageError: for one with less than `MIN_CONTRAST`.
    """
    bands = [extrema_of_band(picture, band) for band in range(len(picture.getbands()))]
    if all(high - low < MIN_CONTRAST for low, high in bands):
        grey = bands[:1] if len(set(bands)) == 1 else bands
        colour = " ".join(str(low) if low == high else f"{low} to {high}" for low, high in grey)
        raise BadImageError(
            f"{what} shows nothing: {cause or f'it is all of one colour ({colour} of 255)'}. "
            "Replace it with the picture that the question is about"
        )


def _load(path: Path, max_side: int, *, keep: bool = False) -> tuple[Image.Image, str]:
    """Return what `_decode` does for a file, or the kept picture, which the caller may change."""
    try:
        # a stream, not the path: given a path, Pillow memory-maps an uncompressed TIFF and
        # scrambles it on EXIF rotation
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            version = path, status.st_ino, status.st_size, status.st_mtime_ns
            if max_side == MAX_SIDE and (kept := _KEPT.get(version)) is not None:
                return kept, ""
            picture, cause = _decode(stream, path, max_side)
            if keep and not cause:
                _KEPT.add(version, picture)
            return picture, cause
    except OSError as error:
        raise BadImageError(_unreadable(path, error)) from error


def _decode(stream: BinaryIO, name: Path | str, max_side: int) -> tuple[Image.Image, str]:
    """Return the picture, and why it shows nothing where the file's values say so."""
    try:
        with Image.open(stream, formats=FORMATS) as image:
            check_image_size(name, image.size)
            return _read(image, max_side)
    except BadImageError:
        raise
    except UnreadableModeError as error:
        raise BadImageError(f"image {name} cannot be displayed faithfully: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImageError(_unidentified(name, stream)) from error
    except Image.DecompressionBombError as error:
        raise BadImageError(f"image {name} has more than {MAX_PIXELS} pixels: scale it down") from error
    except MemoryError as error:
        raise BadImageError(f"image {name} does not fit in memory: scale it down") from error
    except _DAMAGE as error:
        raise BadImageError(_unreadable(name, error)) from error


def image_size(path: Path) -> tuple[int, int]:
    """Return a picture's width and height in pixels as shown, that is, turned as its EXIF data say.

    Raises:
        BadImageError: for a file that is missing or no image.
    """
    try:
        with path.open("rb") as stream, Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except UnidentifiedImageError as error:
        raise BadImageError(f"image {path} is not an image, or its header is damaged") from error
    except _DAMAGE as error:
        raise BadImageError(_unreadable(path, error)) from error
    return (height, width) if turn in _SWAPPED else (width, height)


def image_sha256(path: Path) -> str:
    """Return the SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unidentified(path: Path | str, stream: BinaryIO) -> str:
    size = stream.seek(0, io.SEEK_END)
    if size == 0:
        return f"image {path} is an empty file: copy it again"
    if kind := volume_kind(stream):
        return f"image {path} is a {kind} file: `python -m rlmed.prepare files` reads tables with such files"
    stream.seek(0)
    if stream.read(4) in _TIFF:
        return (
            f"image {path} is a TIFF file whose header is damaged, or whose kind of pixels is not read (of grey: 1 to 16 "
            "bits, 32 bits, float; of colours: 8 or 16 bits): save it again as PNG, or as TIFF of 8 or 16 bits"
        )
    return f"image {path} is not an image, or its header is damaged: replace it with one of {', '.join(FORMATS)}"


def volume_kind(stream: BinaryIO) -> str:
    """Return "DICOM" or "NIfTI" for a file of that kind, which may be gzipped; else ""."""
    stream.seek(0)
    head = stream.read(348)
    if head[:2] == b"\x1f\x8b":
        stream.seek(0)
        try:
            head = gzip.GzipFile(fileobj=stream).read(348)
        except (OSError, EOFError, zlib.error):
            return ""
    if head[128:132] == b"DICM":
        return "DICOM"
    return "NIfTI" if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] == b"n+2\0" else ""


def is_picture(stream: BinaryIO) -> bool:
    """Return whether a file begins as a picture in one of `FORMATS` does; it may be damaged."""
    stream.seek(0)
    try:
        Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        return False
    except (Image.DecompressionBombError, *_DAMAGE):
        return True
    return True


def _unreadable(path: Path | str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"image {path} does not exist: copy it there or correct the path"
    if isinstance(error, OSError) and error.errno is not None:
        return f"image {path} cannot be read: {error.strerror}. Give the path of an image file that you may read"
    return f"image {path} is truncated or damaged ({error}): copy or export it again"


def check_image_size(path: Path | str, size: tuple[int, int]) -> None:
    """Check that `load_image` accepts (width, height) pixels; `path` is for the message.

    Raises:
        BadImageError: for a tiny, extremely elongated or gigantic one.
    """
    width, height = size
    if min(size) < MIN_SIDE:
        raise BadImageError(
            f"image {path} has {width}x{height} pixels, fewer than {MIN_SIDE} a side: replace it with the full picture"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise BadImageError(
            f"image {path} has {width}x{height} pixels, one side more than {MAX_ASPECT} times the other: crop it"
        )
    if width * height > MAX_PIXELS:
        raise BadImageError(f"image {path} has {width}x{height} pixels, more than {MAX_PIXELS}: scale it down")


def _read(image: ImageFile.ImageFile, max_side: int) -> tuple[Image.Image, str]:
    check_mode(image)
    transparent, halved = scaled_transparency(image), is_halved(image)
    # where possible, decode a JPEG at a half, a quarter or an eighth of its size
    image.draft(None, (max_side, max_side))
    image.load()
    if halved:
        check_upper_bytes(image)
    if transparent is not None:
        image.info["transparency"] = transparent
    # after loading, since Pillow itself rotates a TIFF on load and then drops the orientation
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    plain = meant(image)
    # before scaling, which overshoots at edges of wide values
    extrema = cast("tuple[float, float]", plain.getextrema()) if is_wide(plain) else (0.0, 0.0)
    # scale down first, so that a huge picture is never held twice
    picture = _to_rgb(resized(plain, max_side), *extrema)
    return picture if turn is None else picture.transpose(turn), _why_flat(image, plain, extrema)


def _why_flat(image: Image.Image, plain: Image.Image, extrema: tuple[float, float]) -> str:
    """Return what a single-colour picture's file says beyond its colour."""
    if is_wide(plain) and extrema[0] == extrema[1]:
        return f"all its values are {image.getpixel((0, 0))}"
    if plain.mode in ("RGBA", "LA") and extrema_of_band(plain, "A") == (0, 0):
        return "it is transparent all over"
    return ""


def resized(image: Image.Image, max_side: int) -> Image.Image:
    """Scale a picture to what `load_image` promises of its sides."""
    shorter, longer = min(image.size), max(image.size)
    scale = max(min(1.0, max_side / longer), MODEL_MIN_SIDE / shorter)
    if scale == 1.0:
        return image
    new_shorter = max(MODEL_MIN_SIDE, round(shorter * scale))
    new_longer = min(round(longer * scale), MAX_ASPECT * new_shorter)
    size = (new_shorter, new_longer) if image.height == longer else (new_longer, new_shorter)
    # the gap lets Pillow average whole blocks first, which is faster; not supported for 16 bits
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=None if is_wide(image) else 2.0)


def _to_rgb(image: Image.Image, low: float, high: float) -> Image.Image:
    """Convert the picture to RGB; `low` and `high` are the extremes of wide values."""
    if is_wide(image):
        # convert("RGB") would clip everything above 255 to white; double holds every 32-bit integer
        shares = (np.asarray(image, dtype=np.float64) - low) / ((high - low) or 1.0)
        return Image.fromarray((shares.clip(0.0, 1.0) * 255.0).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA"):
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    return image.convert("RGB")
