"""Count the labels of rows once, for F1 over resamples of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlmed.core.types import IntArray

Places = tuple[IntArray, IntArray]
"""A row and a label by number, for each time that a row has one."""


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """Which row has which label, as numbers; labels are numbered in their order.

    Example:
        >>> counts = LabelCounts.of([(("cyst", "mass"), ("cyst",)), (("cyst",), ("mass",))], [(), ()])
        >>> counts.figures(np.array([0, 1])), counts.figures(np.array([1, 1]))
        ({'micro_f1': 0.4, 'macro_f1': 0.3333333333333333}, {'micro_f1': 0.0, 'macro_f1': 0.0})
    """

    labels: int
    """Number of different ones."""
    given: Places
    right: Places
    shared: Places
    """Those that are given and right."""
    known: Places
    """Possible labels of rows; a first row with the same ones stands for all of them."""
    first: IntArray
    """[rows]: the row that stands for it in `known`."""

    @classmethod
    def of(cls, rows: Sequence[tuple[Collection[str], Collection[str]]], known: Sequence[Sequence[str]]) -> LabelCounts:
        """Count the labels of each row.

        Args:
            rows: named and right labels of each.
            known: possible labels of each; empty where any is.
        """
        sets = [({*given}, {*right}) for given, right in rows]
        seen: dict[tuple[str, ...], int] = {}
        first = [seen.setdefault(tuple(possible), row) for row, possible in enumerate(known)]
        names = sorted(
            {label for given, right in sets for label in given | right} | {name for key in seen for name in key}
        )
        numbers = {name: number for number, name in enumerate(names)}

        def places(found: Sequence[tuple[int, Collection[str]]]) -> Places:
            pairs = [(row, numbers[label]) for row, labels in found for label in labels]
            owners, members = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
            return owners, members

        return cls(
            labels=len(names),
            given=places([(row, given) for row, (given, _) in enumerate(sets)]),
            right=places([(row, right) for row, (_, right) in enumerate(sets)]),
            shared=places([(row, given & right) for row, (given, right) in enumerate(sets)]),
            known=places([(row, {*possible}) for possible, row in seen.items()]),
            first=np.array(first, dtype=np.int64),
        )

    def figures(self, rows: IntArray) -> dict[str, float]:
        """Return micro F1 of some rows, and macro F1 if any of their labels counts.

        They are `micro_scores` and `macro_scores` of these rows, over the labels possible in them.

        Args:
            rows: int64 [any number], indices; a row may come several times.
        """
        times = np.bincount(rows, minlength=len(self.first)).astype(np.float64)
        shared, named, right = (self._sums(places, times) for places in (self.shared, self.given, self.right))
        both = named + right
        found = {"micro_f1": float(2 * shared.sum() / both.sum()) if both.any() else 1.0}
        possible = self._sums(self.known, np.bincount(self.first[rows], minlength=len(self.first))) > 0
        counted = np.flatnonzero((both > 0) & possible) if possible.any() else np.flatnonzero(both)
        if len(counted):
            # summed one after the other, as `macro_scores` does
            found["macro_f1"] = sum((2 * shared[counted] / both[counted]).tolist()) / len(counted)
        return found

    def _sums(self, places: Places, times: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
        """Return how often each label comes, [labels]: whole numbers, so exact in any order."""
        rows, labels = places
        return np.bincount(labels, weights=times[rows], minlength=self.labels).astype(np.float64, copy=False)
