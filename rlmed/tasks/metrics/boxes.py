"""Read boxes as models write them, and measure how well they lie: IoU, the best matching.

A box is (x0, y0, x1, y1) with x0 < x1 and y0 < y1, as fractions of the image's width and height;
ratios of areas are the same in pixels. `parse_boxes` takes linear time whatever a model writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from rlmed.tasks.metrics.text import ascii_forms

Box = tuple[float, float, float, float]
KEYS = ("bbox_2d", "bbox", "box", "boxes", "bboxes")
"""Keys of JSON objects that hold boxes."""

_NUMBER = r"(?<![\w.+-])[+-]?(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][+-]?\d++)?+(?![\w.%])"
_POINT = rf"\(\s*+({_NUMBER})\s*+,\s*+({_NUMBER})\s*+(?:,\s*+({_NUMBER})\s*+,\s*+({_NUMBER})\s*+)?+\)"
_TOKEN = re.compile(
    rf"(?P<point>{_POINT})|(?P<number>{_NUMBER})|(?P<open>[\[{{])|(?P<close>[\]}}])|(?P<space>[\s,]++|<\|\w++\|>)"
    r'|(?P<text>"(?:[^"\\]|\\.|\\\Z)*+"?+|\w++)|(?P<colon>:)|(?P<quote>\')|(?P<other>.)',
    re.DOTALL,
)
_QUOTED = re.compile(rf'"\s*+({_NUMBER})\s*+"')
_NONE = re.compile(r"\W*none\W*", re.IGNORECASE)
_FENCE = re.compile(r"```\w*+")


class _Unreadable(Exception):  # noqa: N818
    """What stands in a bracket is no box."""


def parse_boxes(text: str, frame: Sequence[float]) -> list[Box] | None:
    """Return the boxes that a text names, in its order; None if it cannot be read.

    Read are lists of four numbers, alone or in lists; JSON objects with one of `KEYS`, whose other
    keys are left aside; and Qwen's `<|box_start|>(x0,y0),(x1,y1)<|box_end|>`, with or without the
    tokens. `[]` and `none` are no boxes. Words around brackets do not matter. Whatever else stands
    in a bracket, a number that is not finite or a bracket that is not closed makes the text
    unreadable, so no box is guessed.

    Corners in the wrong order are put right, what lies outside of the frame is cut off, and boxes
    without area, also after that, are dropped. A text whose numbers are `are_fractions` is read as
    fractions of the image, whatever the frame.

    Args:
        frame: width and height of the coordinates in which the text is written.

    Example:
        >>> parse_boxes("[[100, 200, 500, 1200]]", (1000, 1000)), parse_boxes("none", (1000, 1000))
        ([(0.1, 0.2, 0.5, 1.0)], [])

    Raises:
        ValueError: for a frame without positive, finite width and height.
    """
    width, height = frame
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ValueError(f"frame={tuple(frame)} must be a positive width and height, for example (1000, 1000)")
    text = _FENCE.sub(" ", ascii_forms(text))
    try:
        reading = _Reading(text)
    except _Unreadable:
        return None
    if not reading.found and not _NONE.fullmatch(text):
        return None
    if are_fractions(reading.boxes):
        width = height = 1.0
    boxes = (_placed(corners, width, height) for corners in reading.boxes)
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes if x0 < x1 and y0 < y1]


def are_fractions(boxes: Sequence[Sequence[float]]) -> bool:
    """Return whether all coordinates are in [0, 1], and one of them is no integer.

    Example:
        >>> are_fractions([(0.1, 0.2, 0.5, 1.0)]), are_fractions([(0, 0, 1, 1)]), are_fractions([(0.1, 0, 2, 1)])
        (True, False, False)
    """
    numbers = [number for box in boxes for number in box]
    return all(0 <= number <= 1 for number in numbers) and not all(float(number).is_integer() for number in numbers)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the area of two boxes' intersection divided by that of their union.

    Example:
        >>> iou((0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 0.5))
        0.3333333333333333
    """
    return float(ious([a], [b])[0, 0])


def match(predicted: Sequence[Sequence[float]], truth: Sequence[Sequence[float]]) -> float:
    """Return the mean IoU of the best one-to-one matching; missing and superfluous boxes count 0.

    That is the largest sum of IoU over pairs, divided by the larger number of boxes; 1.0 without
    any box on either side. With m the smaller and n the larger number, it takes O(m² n) time.

    Example:
        >>> match([(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)], [(0.5, 0.5, 1.0, 1.0)])
        0.5
    """
    if not predicted and not truth:
        return 1.0
    if not predicted or not truth:
        return 0.0
    few, many = sorted((predicted, truth), key=len)
    return _largest_sum(ious(few, many)) / len(many)


class _Reading:
    """One pass over a text: the corners of its boxes, and whether it says where boxes are."""

    def __init__(self, text: str) -> None:
        self.boxes: list[Sequence[float]] = []
        self.found = False
        self._point: tuple[float, float] | None = None
        self._open: list[_Bracket] = []
        for token in _TOKEN.finditer(text):
            self._take(token)
        if self._open or self._point:
            raise _Unreadable

    def _take(self, token: re.Match[str]) -> None:
        kind, text = token.lastgroup, token[0]
        inner = self._open[-1] if self._open else None
        if kind == "open":
            if self._point:
                raise _Unreadable
            self._open.append(_Bracket(text == "{", inner))
        elif kind == "close":
            self._close(text)
        elif kind == "point":
            self._add_point([float(number) for number in token.group(2, 3, 4, 5) if number])
        elif inner and inner.is_object:
            inner.take(kind, text)
        elif inner and (number := _number(kind, text)) is not None:
            inner.numbers.append(number)
        elif inner and kind != "space":
            inner.readable = False

    def _close(self, text: str) -> None:
        if not self._open or self._open[-1].is_object != (text == "}"):
            raise _Unreadable
        bracket = self._open[-1]
        if not bracket.is_object and bracket.counts:
            if not bracket.readable or self._point or (bracket.numbers and bracket.inner):
                raise _Unreadable
            if bracket.numbers:
                self._add(bracket.numbers)
            self.found = self.found or not bracket.inner
        self._open.pop()

    def _add_point(self, numbers: Sequence[float]) -> None:
        if self._open:
            if not self._open[-1].counts:
                return
            self._open[-1].inner = True
        if len(numbers) == 2 and self._point is None:
            self._point = (numbers[0], numbers[1])
            return
        self._add([*(self._point or ()), *numbers])
        self._point = None

    def _add(self, corners: Sequence[float]) -> None:
        if len(corners) != 4 or not all(map(math.isfinite, corners)):
            raise _Unreadable
        self.boxes.append(corners)
        self.found = True


class _Bracket:
    """A list or an object that is not closed yet."""

    def __init__(self, is_object: bool, outer: _Bracket | None) -> None:
        self.is_object = is_object
        self.numbers: list[float] = []
        self.readable = True
        self.inner = False
        """Whether lists, objects or points stand in it."""
        self.key = ""
        self._text = ""
        self._outer_counts = outer is None or outer.counts
        if outer:
            outer.inner = True

    @property
    def counts(self) -> bool:
        """Whether a box here is an answer, not the value of another key of an object."""
        return self.key in KEYS if self.is_object else self._outer_counts

    def take(self, kind: str | None, text: str) -> None:
        """Take a token of an object: the text before a colon is the key up to the next comma."""
        if kind == "text":
            self._text = text.strip('"')
        elif kind == "colon":
            self.key, self._text = self._text, ""
        elif kind == "space" and "," in text:
            self.key = self._text = ""


def _number(kind: str | None, text: str) -> float | None:
    """Return a number, also one in quotes."""
    quoted = _QUOTED.fullmatch(text) if kind == "text" else None
    if kind == "number" or quoted:
        return float(quoted[1] if quoted else text)
    return None


def _placed(corners: Sequence[float], width: float, height: float) -> Iterator[float]:
    """Yield x0, y0, x1, y1 as fractions, in order and within the image."""
    xs, ys = sorted(corners[::2]), sorted(corners[1::2])
    for x, y in zip(xs, ys, strict=True):
        yield min(max(x / width, 0.0), 1.0)
        yield min(max(y / height, 0.0), 1.0)


def ious(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    """Return the IoU of each pair, [len(a), len(b)]."""
    one = np.asarray(a, dtype=np.float64).reshape(-1, 1, 4)
    other = np.asarray(b, dtype=np.float64).reshape(1, -1, 4)
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    shared = np.prod(np.maximum(sides, 0.0), axis=-1)
    union = np.prod(one[..., 2:] - one[..., :2], axis=-1) + np.prod(other[..., 2:] - other[..., :2], axis=-1) - shared
    ious: npt.NDArray[np.float64] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return ious


def _largest_sum(gains: npt.NDArray[np.float64]) -> float:
    """Return the largest sum of entries of [m, n], m <= n, one in each row, none twice in a column.

    The Hungarian method (Kuhn 1955), a shortest augmenting path for each row (Jonker and Volgenant
    1987). Prices keep `reduced` from being negative.
    """
    rows, columns = gains.shape
    row_price, column_price = np.zeros(rows + 1), np.zeros(columns + 1)
    owner = np.full(columns + 1, rows)  # row of each column; the last column begins paths, the last row is nobody
    for row in range(rows):
        owner[columns], column = row, columns
        distance, previous = np.full(columns, np.inf), np.full(columns, columns)
        done = np.zeros(columns + 1, dtype=np.bool_)
        while owner[column] != rows:
            done[column] = True
            reduced = -gains[owner[column]] - row_price[owner[column]] - column_price[:columns]
            nearer = ~done[:columns] & (reduced < distance)
            distance[nearer], previous[nearer] = reduced[nearer], column
            following = int(np.argmin(np.where(done[:columns], np.inf, distance)))
            step = distance[following]
            row_price[owner[done]] += step
            column_price[done] -= step
            distance[~done[:columns]] -= step
            column = following
        while column != columns:
            owner[column] = owner[previous[column]]
            column = int(previous[column])
    taken = np.flatnonzero(owner[:columns] != rows)
    return float(gains[owner[taken], taken].sum())
