"""COCO's metrics of boxes: average precision and recall.

They are computed as by Lin et al. 2014 (arXiv 1405.0312) and their code, pycocotools, for one
category without crowds, all areas, at most 100 boxes an image. Models write no scores: each counts
1.0, so that boxes rank in the order of rows, within a row as written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlmed.tasks.metrics.boxes import ious

Row = tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]
"""Predicted boxes in the order written, and true ones."""

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
"""COCO's thresholds of IoU."""
MOST_BOXES = 100
"""Boxes of an image that count, the first; COCO's `maxDets`."""

_LEVELS = tuple(np.linspace(0.0, 1.0, 101).tolist())
"""Levels of recall at which COCO reads precision."""


def average_precision(rows: Iterable[Row], thresholds: Sequence[float] = THRESHOLDS) -> float:
    """Return COCO's average precision, the mean over thresholds of IoU.

    A box is right if its IoU with a true box that no earlier one has taken reaches the threshold.
    Precision is made to fall with recall and read at recall 0, 0.01, …, 1. Since no scores rank
    boxes across rows, it depends on the order of rows: leave that as in the file.

    Args:
        rows: predicted and true boxes of each image.
        thresholds: one or several; (0.5,) for AP50.

    Example:
        >>> rows = [([(0.0, 0.0, 0.5, 0.5)], [(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)])]
        >>> round(average_precision(rows), 4)  # precision 1 at 51 of 101 levels
        0.505

    Raises:
        ValueError: without any true box, for which it is not defined, or without thresholds.
    """
    return float(Matches.of(rows, thresholds).precision().mean())


def recall_at(rows: Iterable[Row], thresholds: Sequence[float] = THRESHOLDS) -> float:
    """Return the share of true boxes that a predicted one reaches, the mean over thresholds of IoU.

    COCO's average recall with 100 boxes an image; matched as for `average_precision`.

    Example:
        >>> recall_at([([(0.0, 0.0, 0.5, 0.4)], [(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)])], (0.5, 0.9))
        0.25

    Raises:
        ValueError: without any true box, or without thresholds.
    """
    return float(Matches.of(rows, thresholds).recall().mean())


@dataclass(frozen=True, slots=True)
class Matches:
    """Boxes matched once, row by row, for figures over all rows or over resamples of them.

    Example:
        >>> box, other = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)
        >>> matches = Matches.of([([box], [box]), ([box], [other])], (0.5,))
        >>> matches.recall(), matches.drawn(np.array([0, 0])).recall()
        (array([0.5]), array([1.]))
    """

    hits: npt.NDArray[np.bool_]
    """[thresholds, predicted boxes]: which are right, in the order of rows and as written."""
    ends: npt.NDArray[np.int64]
    """[rows]: number of predicted boxes up to and including each row."""
    truths: npt.NDArray[np.int64]
    """[rows]: number of true boxes."""

    @classmethod
    def of(cls, rows: Iterable[Row], thresholds: Sequence[float] = THRESHOLDS) -> Matches:
        """Match the boxes of each row at each threshold of IoU.

        Raises:
            ValueError: without thresholds.
        """
        if not thresholds:
            raise ValueError("thresholds=() leaves nothing to average: give at least one, for example (0.5,)")
        least = np.minimum(thresholds, 1 - 1e-10)[:, None]
        found, truths = [np.zeros((len(thresholds), 0), dtype=np.bool_)], []
        for predicted, truth in rows:
            found.append(_taken(ious(predicted[:MOST_BOXES], truth), least))
            truths.append(len(truth))
        ends = np.cumsum([hits.shape[1] for hits in found[1:]], dtype=np.int64)
        return cls(np.concatenate(found, axis=1), ends, np.array(truths, dtype=np.int64))

    def drawn(self, rows: npt.NDArray[np.int64]) -> Matches:
        """Return those of some rows, by index, in this order; a row may come several times."""
        counts = np.diff(self.ends, prepend=0)[rows]
        ends = np.cumsum(counts)
        places = np.repeat(self.ends[rows] - ends, counts) + np.arange(counts.sum())
        return Matches(self.hits[:, places], ends, self.truths[rows])

    def precision(self) -> npt.NDArray[np.float64]:
        """Return average precision at each threshold.

        Raises:
            ValueError: without any true box.
        """
        boxes = self._boxes()
        # right boxes that reach each level of recall, the first right one for level 0
        needed = np.maximum(np.searchsorted(np.arange(boxes + 1) / boxes, _LEVELS, side="left"), 1)
        return np.array([_precision(right, needed) for right in self.hits])

    def recall(self) -> npt.NDArray[np.float64]:
        """Return the share of true boxes that are reached at each threshold.

        Raises:
            ValueError: without any true box.
        """
        shares: npt.NDArray[np.float64] = self.hits.sum(axis=1) / self._boxes()
        return shares

    def _boxes(self) -> int:
        if not (boxes := int(self.truths.sum())):
            raise ValueError("rows have no true box, so precision and recall of boxes are not defined: leave them out")
        return boxes


def _taken(pairs: npt.NDArray[np.float64], least: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which predicted boxes take a true one, in their order; ties take the last.

    Args:
        pairs: [predicted, true] IoU.
        least: [thresholds, 1].

    Returns:
        bool [thresholds, predicted].
    """
    predicted, truths = pairs.shape
    hits = np.zeros((len(least), predicted), dtype=np.bool_)
    if not pairs.size:
        return hits
    free, each = np.ones((len(least), truths), dtype=np.bool_), np.arange(len(least))
    for place, row in enumerate(pairs):
        good = free & (row >= least)
        best = truths - 1 - np.where(good, row, -1.0)[:, ::-1].argmax(axis=1)
        hits[:, place] = good[each, best]
        free[each, best] &= ~hits[:, place]
    return hits


def _precision(hits: npt.NDArray[np.bool_], needed: npt.NDArray[np.intp]) -> float:
    """Return the mean of the falling precision where COCO reads it.

    Precision is largest at right boxes, and recall grows at them alone, so that only they matter.

    Args:
        hits: which predicted boxes are right.
        needed: number of right boxes at which precision is read, for each level of recall.
    """
    ranks = np.flatnonzero(hits) + 1
    precision = np.zeros(max(len(ranks), int(needed[-1])))
    precision[: len(ranks)] = np.arange(1, len(ranks) + 1) / ranks
    largest = np.maximum.reduceat(precision, needed - 1)  # between two levels, then from each level on
    return float(np.maximum.accumulate(largest[::-1])[::-1].mean())
