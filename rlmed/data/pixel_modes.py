"""Interpret an opened image file's values: Pillow has over twenty modes, not always what is meant.

`rlmed.data.images` first applies `meant`. Its result is grey or colour as the file says, larger
values are brighter, and neighbouring values may be averaged.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT, _SUBSAMPLING = 258, 259, 262, 284, 339, 530
"""Tags of TIFF 6.0."""
_WHITE_IS_ZERO, _YCBCR, _SIGNED, _PLANES = 0, 6, 2, 2

_FEW_LEVELS = 16
"""Of 256: as many as the upper byte of 12-bit values has, the depth of scanners."""


class UnreadableModeError(ValueError):
    """A file's values cannot be shown as meant; the message says what to do but names no file."""


def is_wide(image: Image.Image) -> bool:
    """Return whether grey values have more than 8 bits: 16- or 32-bit integers, or floats."""
    return image.mode[0] in "IF"


def check_mode(image: Image.Image) -> None:
    """Refuse, before decoding, what Pillow would misread.

    Raises:
        UnreadableModeError: with the values that say so.
    """
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        # Adobe's files hold the negative, and Pillow assumes that all do; nothing says what others
        # hold
        raise UnreadableModeError(
            "its colours are CMYK without Adobe's marker, so 255 may be all ink or none: save it as RGB"
        )
    if not isinstance(image, TiffImageFile):
        return
    if _PHOTOMETRIC not in image.tag_v2 and image.mode not in ("RGB", "RGBA"):
        # Pillow then takes the largest value as black, other readers as white
        raise UnreadableModeError(
            "it does not say whether 0 is black or white (PhotometricInterpretation is missing): save it again as PNG"
        )
    bits = image.tag_v2.get(_BITS, (1,))
    if image.tag_v2.get(_PLANAR) == _PLANES and len(bits) > 1 and max(bits) > 8:
        raise UnreadableModeError(
            f"it holds colours of {max(bits)} bits in planes (PlanarConfiguration 2), which are not read: "
            "save it with PlanarConfiguration 1, or with 8 bits"
        )
    subsampling = image.tag_v2.get(_SUBSAMPLING, (2, 2))
    if (
        image.tag_v2.get(_PHOTOMETRIC) == _YCBCR
        and image.tag_v2.get(_COMPRESSION, 1) == 1
        and tuple(subsampling) != (1, 1)
    ):
        raise UnreadableModeError(
            f"it holds uncompressed YCbCr with YCbCrSubSampling {subsampling[0]} {subsampling[1]}, which is not read: "
            "save it as RGB"
        )


def extrema_of_band(image: Image.Image, band: int | str) -> tuple[int, int]:
    """Return the smallest and largest value in a band of 8-bit values."""
    return cast("tuple[int, int]", image.getchannel(band).getextrema())


def is_halved(image: ImageFile.ImageFile) -> bool:
    """Return whether Pillow keeps only upper bytes: 16-bit colours, or 16-bit grey with alpha.

    Call before loading.
    """
    return not is_wide(image) and bool(image.tile) and ";16" in str(image.tile[0].args)


def check_upper_bytes(image: Image.Image) -> None:
    """Refuse a loaded 16-bit picture whose upper bytes are (nearly) all 0 and so show nothing.

    Raises:
        UnreadableModeError: with the bits in use.
    """
    highest = max(extrema_of_band(image, band)[1] for band in image.getbands() if band != "A")
    if highest < _FEW_LEVELS:
        raise UnreadableModeError(
            f"at most the lowest {8 + highest.bit_length()} of its 16 bits are in use, so it would be nearly black: "
            "save it as 16-bit grey without alpha, which is stretched, or with 8 bits"
        )


def scaled_transparency(image: ImageFile.ImageFile) -> int | None:
    """Return the transparent grey of a PNG of less than 8 bits, in the 8 bits that Pillow gives it.

    Call before the pixels are loaded; None if there is nothing to correct.
    """
    value = image.info.get("transparency")
    if image.format != "PNG" or image.mode != "L" or not isinstance(value, int) or not image.tile:
        return None
    factor = {"L;2": 85, "L;4": 17}.get(str(image.tile[0].args))
    return None if factor is None else value * factor


def meant(image: Image.Image) -> Image.Image:
    """Convert a loaded image to L, LA, RGB, RGBA, CMYK, YCbCr, LAB, I;16…, I or F.

    The result has no palette and no extra transparency.

    Raises:
        UnreadableModeError: for floats none of which is finite.
    """
    if isinstance(image, TiffImageFile):
        image = _tiff_meant(image)
    if image.mode == "F":
        return _finite(image)
    if is_wide(image):
        return _native(_opaque(image))
    if image.mode == "La":  # grey premultiplied by its alpha: as composited on black
        return image.getchannel(0)
    if image.mode == "PA" or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "P":
        return image.convert("RGB")
    return image.convert("L") if image.mode == "1" else image


def _tiff_meant(image: TiffImageFile) -> Image.Image:
    """Correct signed bytes, unsigned 32-bit and wide inverted integers, which Pillow misreads."""
    formats = image.tag_v2.get(_SAMPLE_FORMAT, (1,))
    signed = formats[0] == _SIGNED
    if image.mode == "L" and signed:
        return Image.fromarray(np.asarray(image).view(np.int8).astype(np.int32))
    if image.mode == "I" and not signed and image.tag_v2.get(_BITS, (1,))[0] == 32:
        # Pillow's are signed: shifting by half the range keeps order and distances
        return Image.fromarray((np.asarray(image).view(np.uint32) ^ np.uint32(1 << 31)).view(np.int32))
    if is_wide(image) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = np.asarray(image)
        return Image.fromarray(-values if image.mode == "F" else np.invert(values))
    return image


def _finite(image: Image.Image) -> Image.Image:
    """Scale floats to 0..1 by the picture's own range; NaN and -inf become 0."""
    values = np.array(image, dtype=np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        raise UnreadableModeError("none of its values is a finite number (all are NaN or infinite): export it again")
    low = float(values.min(where=finite, initial=np.inf))
    high = float(values.max(where=finite, initial=-np.inf))
    np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
    # halves, since the whole range may exceed the largest float
    values *= 0.5
    values -= np.float32(low / 2)
    if high > low:
        values /= np.float32(high / 2 - low / 2)
    return Image.fromarray(values)


def _opaque(image: Image.Image) -> Image.Image:
    """Replace the declared transparent value of wide integers by the least of the others."""
    value = image.info.get("transparency")
    if not isinstance(value, int):
        return image
    values = np.array(image)
    transparent = values == value
    if transparent.any() and not transparent.all():
        values[transparent] = values[~transparent].min()
    return Image.fromarray(values)


def _native(image: Image.Image) -> Image.Image:
    """Convert to little-endian: Pillow scales big-endian values as if they were little-endian."""
    return Image.fromarray(np.asarray(image).astype("<u2")) if image.mode == "I;16B" else image
