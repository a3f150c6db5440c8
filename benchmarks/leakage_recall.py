"""Which changed copies of pictures the leakage check finds, and which others it takes for copies.

`python -m benchmarks.leakage_recall --data FILE.jsonl`: pictures of the file are changed, one way
at a time, and looked for among all pictures of the file. Without `--data` the generated pictures of
`data=phantom` are used.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from benchmarks.common import RESULTS, report, write_result
from rlmed.data.examples import read_examples
from rlmed.data.images import load_image
from rlmed.data.leakage.near_duplicates import NearDuplicateSearch
from rlmed.data.phantom.studies import write_dataset

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _encoded(quality: int) -> Change:
    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream).convert("RGB")

    return change


def _resized(scale: float) -> Change:
    return lambda image, rng: image.resize((round(image.width * scale), round(image.height * scale)))


def _cropped(share: float) -> Change:
    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        width, height = round(image.width * (1 - share)), round(image.height * (1 - share))
        left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        return image.crop((int(left), int(top), int(left) + width, int(top) + height))

    return change


def _gamma(power: float) -> Change:
    table = [round(255 * (value / 255) ** power) for value in range(256)] * 3
    return lambda image, rng: image.point(table)


def _noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=float)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8))


def _labelled(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    copy = image.copy()
    ImageDraw.Draw(copy).rectangle((4, 4, image.width // 5, image.height // 8), fill="white")
    return copy


def _several(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    brighter = ImageEnhance.Brightness(_cropped(0.03)(image, rng)).enhance(1.2)
    return _encoded(60)(_resized(0.5)(brighter, rng), rng)


CHANGES: Mapping[str, Change] = {
    "JPEG quality 75": _encoded(75),
    "JPEG quality 30": _encoded(30),
    "half size": _resized(0.5),
    "quarter size": _resized(0.25),
    "brightness x 1.3": lambda image, rng: ImageEnhance.Brightness(image).enhance(1.3),
    "contrast x 0.7": lambda image, rng: ImageEnhance.Contrast(image).enhance(0.7),
    "gamma 1.5": _gamma(1.5),
    "noise, 8 grey values": _noisy,
    "blur of 1 pixel": lambda image, rng: image.filter(ImageFilter.GaussianBlur(1)),
    "label over a corner": _labelled,
    "crop 2 %": _cropped(0.02),
    "crop 5 %": _cropped(0.05),
    "crop 8 %": _cropped(0.08),
    "crop 10 %": _cropped(0.10),
    "crop 15 %": _cropped(0.15),
    "mirrored": lambda image, rng: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "quarter turn": lambda image, rng: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 3 degrees": lambda image, rng: image.rotate(3, Image.Resampling.BICUBIC),
    "inverted": lambda image, rng: image.point([255 - value for value in range(256)] * 3),
    "crop 3 %, brighter, half size, JPEG 60": _several,
}


def measure(originals: Sequence[Path], train: Sequence[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """For each change, how many originals are found by their copies, and pairs with others."""
    results = {}
    for name, change in CHANGES.items():
        rng = np.random.default_rng(0)
        copies = []
        for place, path in enumerate(originals):
            copies.append(folder / f"{place}.png")
            change(load_image(path), rng).save(copies[-1])
        search = NearDuplicateSearch(copies)
        search.add(train)
        found = search.result()
        same = {(pair.test, train[pair.train]) for pair in found.same}
        hits = sum((place, path) in same for place, path in enumerate(originals))
        results[name] = {"copies": len(copies), "found": hits, "other_pairs": len(same) - hits}
        report(f"{name:40} {hits:4} of {len(copies)} found, {len(same) - hits} pairs with other pictures")
        for copy in copies:
            copy.unlink()
    return results


def main() -> None:
    """Measure and write `leakage_recall.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leakage_recall", description=__doc__)
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows whose pictures are used")
    parser.add_argument("--copies", type=int, default=150, help="pictures that are changed")
    parser.add_argument("--name", default="leakage_recall", help="of the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = arguments.data or write_dataset(folder / "phantom", 0)["train_mri"]
        train = sorted({example.image for example in read_examples(data).examples if example.image is not None})
        chosen = np.random.default_rng(0).permutation(len(train))[: arguments.copies]
        start = time.perf_counter()
        changes = measure([train[place] for place in chosen], train, folder)
        content = {"pictures": len(train), "changes": changes, "seconds": round(time.perf_counter() - start, 1)}
    write_result(arguments.name, content, arguments.out)


if __name__ == "__main__":
    main()
