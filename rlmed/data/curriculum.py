"""Choose the next example: modalities in fixed shares, no examples without learning signal for now.

Whatever the settings, the sequence depends only on the seed and on what was observed so far.
`state` holds all of it, so a resumed run continues with the very examples that it would have drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

from rlmed.core.config.schema import SelectionConfig
from rlmed.data.sampler import PromptOrder


@dataclass(frozen=True, slots=True)
class Visit:
    """The example that a request draws.

    Example:
        Visit(epoch=1, example=412) is row 412, in the second pass over the rows of its modality.
    """

    epoch: int
    example: int
    """Index of the row."""


def next_turn(shares: Sequence[int], drawn: Sequence[int]) -> int:
    """Return whose turn it is, so that nobody is ever a whole draw ahead of or behind its share.

    Of k parties with shares p_i = shares_i / sum(shares), after n - 1 draws of which x_i were i's,
    i may be drawn now if n·p_i - x_i ≥ 1/(2k-2); of these, draw the one whose need, without it,
    would first reach 1 - 1/(2k-2). Then
    |n·p_i - x_i| ≤ 1 - 1/(2k-2) after every draw (R. Tijdeman, "The chairman assignment problem", 1980).

    Args:
        shares: positive whole numbers.
        drawn: how often this function has drawn each so far.

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
    """Sets aside examples answered correctly too often or too rarely, and retries them later.

    The pass rate is the share of correct completions in the latest `window` groups of an example.
    At `min_pass_rate` or below, or at `max_pass_rate` or above, the example is skipped for
    `cooldown_epochs` epochs; then it returns, and its new group decides together with the latest
    earlier ones. MedVLThinker (arXiv 2508.02669) filters once before training, by 16 samples of the
    base model; here the current policy decides, which outgrows what is easy.
    """

    def __init__(self, config: SelectionConfig) -> None:
        """Start without visits."""
        self._config = config
        # (correct, all) completions of the latest groups
        self._counts: dict[int, list[tuple[int, int]]] = {}
        # the epoch in which it returns, and whether it is too easy
        self._aside: dict[int, tuple[int, bool]] = {}

    def observe(self, visit: Visit, correct: int, completions: int) -> None:
        """Record a group of this example: `correct` of its `completions` are."""
        config = self._config
        counts = [*self._counts.get(visit.example, ()), (correct, completions)][-config.window :]
        self._counts[visit.example] = counts
        rate = sum(count for count, _ in counts) / sum(count for _, count in counts)
        if len(counts) == config.window and not config.min_pass_rate < rate < config.max_pass_rate:
            self._aside[visit.example] = (visit.epoch + config.cooldown_epochs + 1, rate >= config.max_pass_rate)
        else:
            self._aside.pop(visit.example, None)

    def passed_over(self, example: int, epoch: int) -> bool:
        """Return whether to skip the example in this epoch."""
        return epoch < self._aside.get(example, (0, False))[0]

    def aside(self) -> Iterator[tuple[int, bool]]:
        """Return examples set aside (now or to their latest epoch), and if too easy or too hard."""
        return ((example, easy) for example, (_, easy) in self._aside.items())

    def state(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {
            "visits": [[example, counts] for example, counts in self._counts.items()],
            "aside": [[example, *entry] for example, entry in self._aside.items()],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state` returned."""
        self._counts = {example: [(correct, all_) for correct, all_ in counts] for example, counts in state["visits"]}
        self._aside = {example: (epoch, easy) for example, epoch, easy in state["aside"]}


class _Lane:
    """The rows of one modality, reshuffled each epoch."""

    def __init__(self, rows: Sequence[int], seed: int) -> None:
        self.rows, self.cursor = rows, 0
        self._order = PromptOrder(seed, len(rows))

    @property
    def epoch(self) -> int:
        """Return the number of completed passes."""
        return self.cursor // len(self.rows)

    def draw(self, rates: PassRates | None) -> Visit:
        """Return the next example that is not set aside.

        Terminates, since none is set aside forever.
        """
        while True:
            epoch, index = self._order.example_at(self.cursor)
            self.cursor += 1
            if rates is None or not rates.passed_over(self.rows[index], epoch):
                return Visit(epoch, self.rows[index])


class Curriculum:
    """The endless sequence of examples; without mix and selection, `PromptOrder`'s.

    Example:
        >>> curriculum = Curriculum(["CT", "MRI", "MRI"], seed=0, mix={"MRI": 0.5, "CT": 0.5})
        >>> [curriculum.visit(index).example for index in range(6)].count(0)
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
        """Draw from rows of the given modalities.

        Args:
            modalities: one per row, at least one row.
            seed: of the order, not negative.
            mix: share of each modality, relative to their sum; rows of others are never drawn. None
                draws all rows alike.
            selection: see `PassRates`; None is the same as mode "all".

        Raises:
            ValueError: without rows, or for a modality in the mix that no row has.
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
        self._drawn_visits: dict[int, Visit] = {}  # of requests not yet observed

    def visit(self, index: int) -> Visit:
        """Return the example of request `index`: the same each time, until the request is observed.

        Raises:
            ValueError: for an observed request.
        """
        if index not in self._drawn_visits and index < sum(self._drawn):
            raise ValueError(f"request {index} was already observed: its example is no longer known")
        while sum(self._drawn) <= index:
            turn = next_turn(self._shares, self._drawn)
            self._drawn_visits[sum(self._drawn)] = self._lanes[turn].draw(self._rates)
            self._drawn[turn] += 1
        return self._drawn_visits[index]

    def observe(self, index: int, correct: int, completions: int) -> None:
        """Record a scored group, `correct` of whose `completions` are, and forget its example."""
        visit = self._drawn_visits.pop(index)
        if self._rates is not None:
            self._rates.observe(visit, correct, completions)

    def metrics(self) -> dict[str, float]:
        """Return the shares of rows set aside now; empty where all rows are drawn."""
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
        """Return the whole state, as JSON."""
        return {
            "drawn": self._drawn,
            "cursors": [lane.cursor for lane in self._lanes],
            "places": [[index, visit.epoch, visit.example] for index, visit in self._drawn_visits.items()],
            "rates": self._rates.state() if self._rates else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state` returned, under the same settings and rows."""
        self._drawn = list(state["drawn"])
        for lane, cursor in zip(self._lanes, state["cursors"], strict=True):
            lane.cursor = cursor
        self._drawn_visits = {index: Visit(epoch, example) for index, epoch, example in state["places"]}
        if self._rates is not None:
            self._rates.restore(state["rates"])


def _rows_by_modality(modalities: Sequence[str], wanted: Sequence[str]) -> list[Sequence[int]]:
    """Return the rows of each wanted modality."""
    found = Counter(modalities)
    for name in wanted:
        if name not in found:
            known = ", ".join(f"{known or 'none'!r} ({count} rows)" for known, count in sorted(found.items()))
            raise ValueError(
                f"data.mix names the modality {name!r}, which no training row has; they have {known}: correct the name, "
                "or add rows with it"
            )
    return [[row for row, modality in enumerate(modalities) if modality == name] for name in wanted]
