"""Image files of any kind to 8-bit RGB pictures of a sensible size."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_SIDE = 2048
"""Longer sides are scaled down to this when an image is read; every supported model sees fewer pixels."""
MIN_SIDE = 4
"""Smaller images are taken for defects of the file."""
MODEL_MIN_SIDE = 28
"""Sides are scaled up to at least this: one visual token of the Qwen2-VL family."""
MAX_ASPECT = 200
"""Image processors of the Qwen2-VL family refuse more elongated images."""
MAX_PIXELS = 400_000_000
"""More pixels than this are not decoded."""


class BadImageError(ValueError):
    """An image file that cannot be used; the message names the file and the cure."""


def load_image(path: Path, *, max_side: int = MAX_SIDE) -> Image.Image:
    """Read an image file as RGB.

    16-bit grey values are stretched to the file's own range, transparency is laid on black, EXIF rotation is applied, of
    an animation the first frame is taken.

    Args:
        path: PNG, JPEG, TIFF or anything else that Pillow reads.
        max_side: longer sides are scaled down to this, while decoding where the format allows it.

    Raises:
        BadImageError: for a missing, empty, truncated, tiny, extremely elongated or gigantic image, or no image at all.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            with Image.open(path) as image:
                _check_size(path, image.size)
                image.draft("RGB" if image.mode == "YCbCr" else None, (max_side, max_side))
                image.load()
                return _fit(_to_rgb(ImageOps.exif_transpose(image)), max_side)
    except FileNotFoundError as error:
        raise BadImageError(f"image {path} does not exist") from error
    except UnidentifiedImageError as error:
        raise BadImageError(f"image {path} is empty or no image that Pillow can read: replace the file") from error
    except Image.DecompressionBombError as error:
        raise BadImageError(f"image {path} is too large: {error}; scale it down") from error
    except BadImageError:
        raise
    # Pillow's decoders answer damage with all of these
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, MemoryError) as error:
        raise BadImageError(f"image {path} is truncated or damaged ({error}): replace the file") from error


def image_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise BadImageError(f"image {path} has {width}x{height} pixels: at least {MIN_SIDE} on each side are needed")
    if max(size) > MAX_ASPECT * min(size):
        raise BadImageError(f"image {path} has {width}x{height} pixels: sides may differ by a factor of {MAX_ASPECT} at most")
    if width * height > MAX_PIXELS:
        raise BadImageError(f"image {path} has {width}x{height} pixels, more than {MAX_PIXELS}: scale it down")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        # convert("RGB") would clip everything above 255 to white
        values = np.asarray(image, dtype=np.float64)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        scaled = np.nan_to_num((values - low) * (255.0 / max(high - low, 1e-12)))
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
    return image.convert("RGB")


def _fit(image: Image.Image, max_side: int) -> Image.Image:
    """Scale, sides in proportion, so that no side is above `max_side` or below what a model takes."""
    if max(image.size) > max_side:
        image.thumbnail((max_side, max_side), reducing_gap=2.0)
    if min(image.size) < MODEL_MIN_SIDE:
        factor = MODEL_MIN_SIDE / min(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    return image
