"""Pictures that are all different, and files of them and of changed copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter


def picture(seed: int, width: int = 200, height: int = 160) -> Image.Image:
    """Smooth grey structures of several sizes on dark ground; each seed gives its own picture."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width))
    for blur in (3, 8, 20):
        noise = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
        field = np.asarray(noise.filter(ImageFilter.GaussianBlur(blur)), dtype=float)
        total += (field - field.mean()) / field.std()
    grey = np.clip(100 + 45 * total, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def save(folder: Path, name: str, image: Image.Image, **options: int) -> Path:
    """The path of the image written to `folder/name`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def cropped(image: Image.Image, share: float, left: float = 0.5, top: float = 0.5) -> Image.Image:
    """Without `share` of width and height; `left` of what is cut off across is cut on the left."""
    width, height = image.size
    cut = round(width * share), round(height * share)
    x, y = round(cut[0] * left), round(cut[1] * top)
    return image.crop((x, y, x + width - cut[0], y + height - cut[1]))


def marked(grey: int = 0, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """One grey value, mode L, marked at the lower right: one colour alone counts as a defect."""
    image = Image.new("L", size, grey)
    image.paste((grey + 128) % 256, (size[0] * 3 // 4, size[1] * 3 // 4, *size))
    return image
