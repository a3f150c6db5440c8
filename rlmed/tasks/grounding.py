"""Grounding: where something lies, as boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rlmed.core.spelling import shorten
from rlmed.core.types import IntArray
from rlmed.tasks.base import TEMPLATE, ImageSize, Task, columns
from rlmed.tasks.metrics.boxes import are_fractions, match, parse_boxes
from rlmed.tasks.metrics.coco import THRESHOLDS, Matches

THOUSANDTHS = (1000, 1000)
"""Frame in which most models write boxes: thousandths of the image's width and height."""
LEAST_SIDE = 20
"""Thousandths or pixels: sides below are written with decimals."""
IN_THOUSANDTHS, IN_PIXELS = "thousandths of the image's width and height", "pixels of the image"
"""What templates say of the frame."""


class Grounding(Task):
    """Boxes; truth: `{"boxes": [[x0, y0, x1, y1], …], "frame": [width, height]}`.

    Truth's boxes are fractions of the image, answers numbers in the frame: thousandths, or pixels
    of the picture as the model is given it, whose size is known when its prompt is made. An answer
    is right if its boxes overlap the true ones with a mean intersection over union of at least 0.5,
    missing and superfluous boxes counting 0.
    """

    name = "grounding"
    template = TEMPLATE.format(
        instruction=f"provide the boxes as [[x0, y0, x1, y1], ...] in {IN_THOUSANDTHS} ([] if there is nothing to find)"
    )
    main = "iou"
    threshold = 0.5
    score_names = ("iou",)
    placeholder: ClassVar[list[Any]] = []

    def read(self, answer: Any, options: Sequence[str], size: ImageSize) -> Any:
        """Return boxes in pixels of the image file as fractions of it."""
        if options:
            raise ValueError("it has options, and its task is grounding: leave them out, or the task")
        if not isinstance(answer, list):
            raise ValueError(f"its answer is {shorten(answer)}: write a list of boxes [x0, y0, x1, y1] in pixels")
        if len(answer) == 4 and all(type(x) in (int, float) for x in answer):
            raise ValueError(
                f"its answer {shorten(answer)} is a box, and belongs into a list of boxes: write {shorten([answer])}"
            )
        width, height = size()
        return {"boxes": [_fractions(box, width, height) for box in answer], "frame": list(THOUSANDTHS)}

    def in_pixels(self, template: str) -> str:
        """Return the template with pixels in the place of thousandths."""
        return template.replace(IN_THOUSANDTHS, IN_PIXELS).replace("thousandths", "pixels")

    def framed(self, truth: Any, size: tuple[int, int]) -> Any:
        """Return the truth with pixels of a picture of this size as its frame."""
        return {**truth, "frame": list(size)}

    def write(self, truth: Any) -> str:
        """Return the boxes in the frame: integers, or as many decimals as a small box needs."""
        width, height = truth["frame"]
        written = [_rounded(_scaled(box, width, height)) for box in truth["boxes"]]
        if are_fractions(written):  # boxes in the first thousandth would be read as fractions: they are written so
            written = [_rounded(box) for box in truth["boxes"]]
        return str(written)

    def score(self, answer: str, truth: Any) -> Mapping[str, float] | None:
        """Return the mean intersection over union of the best one-to-one matching."""
        boxes = parse_boxes(answer, truth["frame"])
        return None if boxes is None else {"iou": match(boxes, truth["boxes"])}

    def explain(self, answer: str, truth: Any, size: ImageSize) -> str:
        """Return the units of the answer's boxes, and the boxes in pixels of the image file."""
        width, height = size()
        boxes = [_scaled(box, width, height) for box in parse_boxes(answer, truth["frame"]) or []]
        if truth["frame"] == list(THOUSANDTHS):
            units = IN_THOUSANDTHS
        else:
            units = f"pixels of the image as the model saw it, {truth['frame'][0]}x{truth['frame'][1]}"
        return f"in {units}; in pixels of the file, {width}x{height}: {[_rounded(box) for box in boxes]}"

    def same(self, first: str, second: str, truth: Any, second_truth: Any = None) -> bool:
        """Return whether the boxes of both overlap as those of a right answer and the truth do."""
        written = ((first, truth), (second, second_truth or truth))
        boxes = [parse_boxes(answer, given["frame"]) or [] for answer, given in written]
        return self.passes(match(*boxes))

    def asserts(self, answer: str, truth: Any, options: Sequence[str]) -> bool | None:
        """Return whether the answer has any box."""
        return bool(parse_boxes(answer, truth["frame"]))

    def over_file(self, answers: Sequence[tuple[str | None, Any]]) -> Mapping[str, float]:
        """Return mean average precision (also at 0.5) and recall at 0.5, as COCO defines them."""
        return _figures(_matches(answers))

    def over_resamples(
        self, answers: Sequence[tuple[str | None, Any]], draws: IntArray
    ) -> Mapping[str, Sequence[float]]:
        """Return `over_file` of each draw of rows; boxes are matched once."""
        matches = _matches(answers)
        return columns(_figures(matches.drawn(rows)) for rows in draws)


def _matches(answers: Sequence[tuple[str | None, Any]]) -> Matches:
    return Matches.of(
        (
            ((parse_boxes(answer, truth["frame"]) or []) if answer is not None else [], truth["boxes"])
            for answer, truth in answers
        ),
        THRESHOLDS,
    )


def _figures(matches: Matches) -> dict[str, float]:
    """Return mean average precision, that at 0.5, and recall at 0.5; nothing without a true box."""
    if not matches.truths.any():
        return {}
    precision, recall = matches.precision(), matches.recall()
    return {"mAP": float(precision.mean()), "AP50": float(precision[0]), "recall50": float(recall[0])}


def _scaled(box: Sequence[float], width: float, height: float) -> list[float]:
    return [x * scale for x, scale in zip(box, (width, height) * 2, strict=True)]


def _rounded(box: Sequence[float]) -> list[float]:
    """Return a box's coordinates rounded to integers, or to decimals if a side is below 20.

    A side keeps at least two digits, so rounding changes it by 5 % at most.
    """
    side = min(box[2] - box[0], box[3] - box[1])
    digits = max(0, math.ceil(math.log10(LEAST_SIDE / side) - 1e-9)) if side > 0 else 0
    return [round(x, digits) if digits else round(x) for x in box]


def _fractions(box: Any, width: int, height: int) -> list[float]:
    """Return a box in pixels as fractions.

    Raises:
        ValueError: for anything but four numbers with x0 < x1 and y0 < y1 inside the image, and for
            fractions: nothing to find lies in the first pixel.
    """
    # NaN and infinity fail the comparisons; `math.isfinite` cannot take a long integer
    good = isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)
    if not good or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise ValueError(
            f"its box {shorten(box)} is not [x0, y0, x1, y1] with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}, "
            "the pixels of its first image"
        )
    if max(box) <= 1 < max(width, height):
        raise ValueError(
            f"its box {shorten(box)} lies within the first pixel of its first image, of {width}x{height}: write pixels; "
            "multiply fractions by the image's width and height"
        )
    return [x / scale for x, scale in zip(box, (width, height) * 2, strict=True)]
