"""Which example is asked next: modalities in fixed shares, and not the examples from which nothing can be learnt for now.

Whatever is set here, the sequence of examples depends on the seed and on what was observed until then alone. `state` holds
all of it, so a resumed run goes on with the very examples that it would have had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

from rlmed.core.config import SelectionConfig
from rlmed.data.sampler import PromptOrder


@dataclass(frozen=True, slots=True)
class Place:
    """What a request asks.

    Example:
        Place(epoch=1, example=412) is row 412, in the second pass over the rows of its modality.
    """

    epoch: int
    example: int
    """Index of the row."""


def next_turn(shares: Sequence[int], drawn: Sequence[int]) -> int:
    """Whose turn it is, so that nobody is ever a whole draw ahead of or behind its share.

    With share p_i = shares_i / sum(shares) of k, n - 1 draws made and x_i of them i's, i may be drawn now if
    n·p_i - x_i ≥ 1/(2k-2); of these the one is drawn whose need, without it, would first reach 1 - 1/(2k-2). If all turns
    are taken so, |n·p_i - x_i| ≤ 1 - 1/(2k-2) after every draw (R. Tijdeman, "The chairman assignment problem", 1980).

    Args:
        shares: positive whole numbers.
        drawn: how often each was drawn so far, by turns of this function.

    Example:
        >>> drawn = [0, 0, 0]
        >>> for _ in range(10):
        ...     drawn[next_turn([5, 3, 2], drawn)] += 1
        >>> drawn
        [5, 3, 2]
    """
    total, draw, parts = sum(shares), sum(drawn) + 1, 2 * len(shares) - 2
    if not parts:
        return 0
    may = [i for i, share in enumerate(shares) if (draw * share - drawn[i] * total) * parts >= total]
    # the first draw at which (draw·share - drawn·total)·parts ≥ total·(parts - 1), rounded up
    return min(may, key=lambda i: (-(-total * (parts - 1 + drawn[i] * parts) // (parts * shares[i])), i))


class PassRates:
    """Sets examples aside that were answered right too often or too rarely, and has them tried again later.

    The pass rate is the share of right completions among those of the latest `min_visits` groups of an example. At `low` or
    below, or at `high` or above, the example is passed over for `retest_after` epochs; then it comes again, and its new
    group decides together with the latest earlier ones. MedVLThinker (arXiv 2508.02669) filters once and for all before
    training, by 16 samples of the base; here the policy of the moment decides, which grows out of what is easy.
    """

    def __init__(self, config: SelectionConfig) -> None:
        """Nothing was visited yet."""
        self._config = config
        self._visits: dict[int, list[tuple[int, int]]] = {}  # right completions and all, of the latest groups
        self._aside: dict[int, tuple[int, bool]] = {}  # the epoch in which it comes again, and whether it is too easy

    def observe(self, place: Place, right: int, completions: int) -> None:
        """A group of this place has `right` of `completions` right."""
        config = self._config
        visits = [*self._visits.get(place.example, ()), (right, completions)][-config.min_visits :]
        self._visits[place.example] = visits
        rate = sum(count for count, _ in visits) / sum(count for _, count in visits)
        if len(visits) == config.min_visits and not config.low < rate < config.high:
            self._aside[place.example] = (place.epoch + config.retest_after + 1, rate >= config.high)
        else:
            self._aside.pop(place.example, None)

    def passed_over(self, example: int, epoch: int) -> bool:
        """Whether the example stays away from this epoch."""
        return epoch < self._aside.get(example, (0, False))[0]

    def aside(self) -> Iterator[tuple[int, bool]]:
        """Examples that are passed over, or were until their latest epoch, and whether they are too easy (or too hard)."""
        return ((example, easy) for example, (_, easy) in self._aside.items())

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "visits": [[example, visits] for example, visits in self._visits.items()],
            "aside": [[example, *entry] for example, entry in self._aside.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._visits = {example: [(right, all_) for right, all_ in visits] for example, visits in state["visits"]}
        self._aside = {example: (epoch, easy) for example, epoch, easy in state["aside"]}


class _Lane:
    """The rows of one modality, in a fresh order each epoch."""

    def __init__(self, rows: Sequence[int], seed: int) -> None:
        self.rows, self.cursor = rows, 0
        self._order = PromptOrder(seed, len(rows))

    @property
    def epoch(self) -> int:
        """Whole passes behind."""
        return self.cursor // len(self.rows)

    def draw(self, rates: PassRates | None) -> Place:
        """The next one that is not passed over. It ends: none is passed over for ever."""
        while True:
            epoch, place = self._order.example_at(self.cursor)
            self.cursor += 1
            if rates is None or not rates.passed_over(self.rows[place], epoch):
                return Place(epoch, self.rows[place])


class Curriculum:
    """The endless sequence of places. Without mix and selection it is `PromptOrder`'s.

    Example:
        >>> curriculum = Curriculum(["CT", "MRI", "MRI"], seed=0, mix={"MRI": 0.5, "CT": 0.5})
        >>> [curriculum.place(index).example for index in range(6)].count(0)
        3
    """

    def __init__(
        self,
        modalities: Sequence[str],
        seed: int,
        *,
        mix: Mapping[str, float] | None = None,
        selection: SelectionConfig | None = None,
    ) -> None:
        """Draw from rows of these modalities.

        Args:
            modalities: of each row, at least one.
            seed: of the order, not negative.
            mix: share of each modality, relative to their sum; rows of others are never drawn. None takes all rows alike.
            selection: see `PassRates`; None is as mode "all".

        Raises:
            ValueError: for no rows, or a modality in the mix that no row has.
        """
        lanes: list[Sequence[int]] = [range(len(modalities))]
        self._shares = [1]
        if mix is not None:
            lanes = _rows_by_modality(modalities, list(mix))
            shares = [Fraction(str(share)) for share in mix.values()]
            whole = lcm(*(share.denominator for share in shares))
            self._shares = [int(share * whole) for share in shares]
        self._lanes = [_Lane(rows, seed) for rows in lanes]
        self._lane_of = {row: lane for lane in self._lanes for row in lane.rows}
        self._drawn = [0] * len(self._lanes)
        self._rates = PassRates(selection) if selection is not None and selection.mode == "pass_rate" else None
        self._places: dict[int, Place] = {}  # of requests that were not observed yet

    def place(self, index: int) -> Place:
        """The place of request `index`: the same each time, until the request is observed.

        Raises:
            ValueError: for a request that was observed.
        """
        if index not in self._places and index < sum(self._drawn):
            raise ValueError(f"request {index} was observed already: its place is forgotten")
        while sum(self._drawn) <= index:
            turn = next_turn(self._shares, self._drawn)
            self._places[sum(self._drawn)] = self._lanes[turn].draw(self._rates)
            self._drawn[turn] += 1
        return self._places[index]

    def observe(self, index: int, right: int, completions: int) -> None:
        """A group was scored: `right` of its `completions` are right. Its place is not needed any more."""
        place = self._places.pop(index)
        if self._rates is not None:
            self._rates.observe(place, right, completions)

    def metrics(self) -> dict[str, float]:
        """Shares of the rows that are set aside at the moment; none where all rows are taken."""
        if self._rates is None:
            return {}
        reasons = Counter(
            easy for row, easy in self._rates.aside() if self._rates.passed_over(row, self._lane_of[row].epoch)
        )
        rows = len(self._lane_of)
        return {
            "prompts/set_aside": reasons.total() / rows,
            "prompts/too_easy": reasons[True] / rows,
            "prompts/too_hard": reasons[False] / rows,
        }

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "drawn": self._drawn,
            "cursors": [lane.cursor for lane in self._lanes],
            "places": [[index, place.epoch, place.example] for index, place in self._places.items()],
            "rates": self._rates.state() if self._rates else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, under the same settings and rows."""
        self._drawn = list(state["drawn"])
        for lane, cursor in zip(self._lanes, state["cursors"], strict=True):
            lane.cursor = cursor
        self._places = {index: Place(epoch, example) for index, epoch, example in state["places"]}
        if self._rates is not None:
            self._rates.restore(state["rates"])


def _rows_by_modality(modalities: Sequence[str], wanted: Sequence[str]) -> list[Sequence[int]]:
    """Rows of each wanted modality."""
    found = Counter(modalities)
    for name in wanted:
        if name not in found:
            known = ", ".join(f"{known or 'none'!r} ({count} rows)" for known, count in sorted(found.items()))
            raise ValueError(
                f"data.mix names the modality {name!r}, which no training row has; they have {known}: mend the name, or add "
                "rows with it"
            )
    return [[row for row, modality in enumerate(modalities) if modality == name] for name in wanted]
