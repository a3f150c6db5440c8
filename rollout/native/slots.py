"""State of a decode step: one row of fixed tensors for each completion, in its device's memory.

A step reads and writes these tensors in place and needs nothing from the host. The host writes them
only when rows come or go.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlmed.models.attention import GroupTable
from rlmed.models.decode_kernels import StepPages
from rlmed.models.policy import Policy
from rollout.native.kv_pages import SCRATCH, PagePool
from rollout.native.sampler import BatchSampling, Uses, row_settings, uniforms
from rollout.native.sequence import Sequence, SequenceGroup

SMALLEST_BUCKET = 8


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How decode steps are laid out on a kind of device; the step itself is the same on all."""

    page_tokens: int | None
    """Tokens in a page; None: a page holds a whole prompt or completion."""
    buckets: bool
    """Round sizes up to powers of two, so that few different steps occur; else they are exact."""
    lag: int
    """Steps that the host is behind: it reads the tokens of one while the next runs."""
    graphs: bool
    """Replay steps as CUDA graphs."""
    kernels: bool
    """Compute steps with the kernels that the policy's probes have accepted."""

    @classmethod
    def for_device(cls, device: torch.device) -> StepPlan:
        """Return the plan for a device."""
        if device.type == "cuda":
            return cls(page_tokens=64, buckets=True, lag=1, graphs=True, kernels=True)
        return cls(page_tokens=None, buckets=False, lag=0, graphs=False, kernels=True)

    def bucket(self, size: int, *, smallest: int = 1, largest: int | None = None) -> int:
        """Return what stands for `size` in a step's shape: not smaller, `largest` at most."""
        if not self.buckets:
            return size
        bucket = max(smallest, 1 << (size - 1).bit_length())
        return bucket if largest is None else min(bucket, largest)

    def width(self, tokens: int) -> int:
        """Return the width of keys for `tokens` of them: a multiple of a page's size."""
        return self.bucket(tokens, smallest=self.page_tokens or 1)


@dataclass(frozen=True, slots=True)
class StepShape:
    """All that the host decides about a step; steps of one shape make the same calls."""

    rows: int
    """R."""
    rows_in_order: bool
    """Their pages are those after the scratch page, in order."""
    suffix_width: int
    level: bool
    """All suffixes are equally long, and rows in order."""
    groups: int
    """B."""
    groups_in_order: bool
    """As `rows_in_order`."""
    prefix_width: int
    members: int
    """M: most rows of a group."""
    members_in_order: bool
    """Row b * M + m is member m of group b."""
    uses: Uses

    def widened(self, suffix_width: int) -> StepShape:
        """Return the shape with another width of suffixes."""
        return replace(self, suffix_width=suffix_width)


class Slots:
    """The tensors.

    Row r is the completion `rows[r]` of the last `lay_out`; rows beyond stand for none, sample
    nothing that counts and write to the scratch page.
    """

    def __init__(self, policy: Policy, plan: StepPlan, size: int, position_rows: int) -> None:
        """Make `size` free rows."""
        device = policy.device
        self._plan, self._size = plan, size
        self._vocabulary, self._position_rows = policy.projection.out_features, position_rows
        ends = torch.tensor(sorted(policy.end_token_ids), dtype=torch.int64, device=device)
        self._goes_on = torch.ones(self._vocabulary, dtype=torch.bool, device=device).index_fill_(0, ends, False)
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        """int64 [size], newest token of each row: not cached yet, the next step's input."""
        self.logprobs = torch.zeros(size, dtype=torch.float32, device=device)
        """float32 [size], its log-probability."""
        self.counts = torch.ones(size, dtype=torch.int64, device=device)
        """int64 [size], tokens sampled so far; one more than are cached."""
        self.alive = torch.zeros(size, dtype=torch.bool, device=device)
        """bool [size]: its next token counts."""
        self._numbers = torch.zeros(4, size, dtype=torch.int64, device=device)
        self._limits, self._first_positions, self._top_k, self._greedy = self._numbers
        self._floats = torch.ones(2, size, dtype=torch.float32, device=device)
        self._temperature, self._top_p = self._floats
        self._order = torch.zeros(2, size, dtype=torch.int64, device=device)
        self._place_in_table, self.prefix_lengths = self._order
        self._table = torch.zeros(size * size, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(size, 0, dtype=torch.float64, device=device)
        self.widen(0, 0, 0)

    def widen(self, prefix_pages: int, suffix_pages: int, max_tokens: int) -> None:
        """Make page tables with so many columns, and room for the numbers of the draws."""
        # a row that has ended reads one number more
        uniforms = self.uniforms.new_zeros(self._size, max_tokens + 1)
        uniforms[:, : self.uniforms.shape[1]] = self.uniforms
        self.uniforms = uniforms
        """float64 [size, most tokens + 1]: number t decides the draw of a row's token t."""
        self.prefix_pages = self.tokens.new_full((self._size, prefix_pages), SCRATCH)
        """int64 [size, pages of a prompt], by group."""
        self.suffix_pages = self.tokens.new_full((self._size, suffix_pages), SCRATCH)
        """int64 [size, pages of a completion], by row."""

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def lay_out(self, rows: Rows[Sequence], groups: Rows[SequenceGroup]) -> StepShape:
        """Write what the host knows of live rows and groups; return the shape of steps.

        Tokens, counts and `alive` are the device's own: `keep` and `begin` change them.
        """
        plan, size = self._plan, self._size
        rows_in_order = self._in_order([row.pages for row in rows])
        entry_of = {id(group): entry for entry, group in enumerate(groups)}
        entry_of_row = [entry_of[id(row.group)] for row in rows]
        member_of_row, members = [], [0] * len(groups)
        for entry in entry_of_row:
            member_of_row.append(members[entry])
            members[entry] += 1
        shape = StepShape(
            rows=plan.bucket(len(rows), smallest=SMALLEST_BUCKET, largest=size),
            rows_in_order=rows_in_order,
            suffix_width=0,
            level=rows_in_order and len({row.sampled for row in rows}) == 1,
            groups=plan.bucket(len(groups), largest=size),
            groups_in_order=self._in_order([group.pages for group in groups]),
            prefix_width=plan.width(max(group.positions.shape[1] for group in groups)),
            members=plan.bucket(max(members), largest=size),
            members_in_order=False,
            uses=Uses.of([group.request.sampling for group in groups]),
        )
        table = np.full((shape.groups, shape.members), -1)
        table[entry_of_row, member_of_row] = range(len(rows))
        if not plan.buckets and np.array_equal(table.ravel(), np.arange(len(rows))):
            shape = replace(shape, members_in_order=True)
        order = np.zeros((2, size), dtype=np.int64)
        order[0, : len(rows)] = np.array(entry_of_row) * shape.members + member_of_row
        order[1, : len(groups)] = [group.positions.shape[1] for group in groups]
        _write(self._table[: table.size], table.ravel())
        _write(self._order, order)
        _write(self.prefix_pages, _page_table([group.pages for group in groups], self.prefix_pages))
        _write(self.suffix_pages, _page_table([row.pages for row in rows], self.suffix_pages))
        self._write_settings(rows)
        return shape

    def _in_order(self, pages: Rows[Rows[int]]) -> bool:
        """Return whether sequences have one page each, one after the other behind the scratch page.

        Products then read them as they lie.
        """
        whole = self._plan.page_tokens is None and not self._plan.buckets
        return whole and all(own[0] == SCRATCH + 1 + place for place, own in enumerate(pages))

    def _write_settings(self, rows: Rows[Sequence]) -> None:
        numbers, floats = np.zeros((4, self._size), dtype=np.int64), np.ones((2, self._size), dtype=np.float32)
        columns = []
        for row in rows:
            sampling = row.group.request.sampling
            temperature, top_p, top_k = row_settings(sampling, self._vocabulary)
            fixed = (sampling.max_tokens, row.group.next_position, top_k, sampling.greedy)
            columns.append((*fixed, temperature, top_p))
        # rows that stand for nobody filter nothing: a distribution without tokens would be NaN
        numbers[2] = self._vocabulary
        *fixed_columns, temperatures, top_ps = zip(*columns, strict=True)
        numbers[:, : len(rows)] = fixed_columns
        floats[:, : len(rows)] = temperatures, top_ps
        _write(self._numbers, numbers)
        _write(self._floats, floats)

    def keep(self, kept: Rows[int]) -> None:
        """Keep these rows of the device's own state as the first ones; free all others."""
        index = _to_device(np.array(kept, dtype=np.int64), self.tokens.device)
        for state, free in ((self.tokens, 0), (self.counts, 1), (self.alive, False), (self.uniforms, 0.0)):
            rows = state.index_select(0, index)
            state.fill_(free)
            state[: len(kept)] = rows

    def begin(self, rows: slice, seeds: Tensor) -> Tensor:
        """Start new rows, which are laid out, from the seeds of their streams, int64 [R].

        Returns:
            float64 [R], the numbers that decide their first draws, for `record`.
        """
        self.counts[rows] = 0
        self.alive[rows] = True
        steps = torch.arange(self.uniforms.shape[1], device=seeds.device)
        self.uniforms[rows] = uniforms(seeds.unsqueeze(1), steps)
        return self.uniforms[rows, 0]

    def record(self, rows: slice, tokens: Tensor, logprobs: Tensor) -> None:
        """Write each row's new token, int64 [R], and its log-probability; find which rows end."""
        alive, counts = self.alive[rows], self.counts[rows]
        # a row that has ended goes on with token 0, whatever its company makes of it
        torch.mul(tokens, alive, out=self.tokens[rows])
        self.logprobs[rows] = logprobs
        counts += alive
        alive &= counts < self._limits[rows]
        alive &= self._goes_on.index_select(0, tokens)

    def positions(self, rows: slice) -> Tensor:
        """Return the rotary positions of the newest tokens, int64 [position rows, R]."""
        positions: Tensor = self._first_positions[rows] + self.counts[rows] - 1
        return positions.expand(self._position_rows, -1)

    def step_pages(self, prefix: PagePool, suffix: PagePool, shape: StepShape) -> StepPages:
        """Return the tables for the kernels, which read them as int32."""
        rows, groups = slice(shape.rows), slice(shape.groups)
        table = self._table[: shape.groups * shape.members].view(shape.groups, shape.members)
        return StepPages(
            prefix=(prefix.keys, prefix.values),
            suffix=(suffix.keys, suffix.values),
            prefix_pages=self.prefix_pages[groups].to(torch.int32),
            prefix_lengths=self.prefix_lengths[groups].to(torch.int32),
            members=table.to(torch.int32),
            suffix_pages=self.suffix_pages[rows].to(torch.int32),
            counts=self.counts[rows].to(torch.int32),
            widths=(shape.prefix_width, shape.suffix_width),
        )

    def draws(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return float64 numbers of the next draws, temperatures, and which rows are greedy."""
        return self.next_uniforms(rows), self._temperature[rows], self._greedy[rows] != 0

    def prompt_lengths(self, shape: StepShape) -> Tensor:
        """Return the tokens of each row's prompt, int64 [R]."""
        groups = self._place_in_table[: shape.rows] // shape.members
        lengths: Tensor = self.prefix_lengths.index_select(0, groups)
        return lengths

    def group_table(self, shape: StepShape) -> GroupTable:
        """Return which rows belong to which group."""
        table = self._table[: shape.groups * shape.members].view(shape.groups, shape.members)
        places = self._place_in_table[: shape.rows]
        return GroupTable(None if shape.members_in_order else table, places, shape.groups)

    def next_uniforms(self, rows: slice) -> Tensor:
        """Return the numbers that decide the next draws, float64 [R]."""
        return self.uniforms[rows].gather(1, self.counts[rows].unsqueeze(1)).squeeze(1)

    def sampling(self, shape: StepShape) -> BatchSampling:
        """Return the rows' sampling settings."""
        rows, uses = slice(shape.rows), shape.uses
        return BatchSampling(
            temperature=self._temperature[rows].unsqueeze(1) if uses.temperature else None,
            greedy=self._greedy[rows] != 0 if uses.greedy else None,
            top_k=self._top_k[rows].unsqueeze(1) if uses.top_k else None,
            top_p=self._top_p[rows].unsqueeze(1) if uses.top_p else None,
        )


def _page_table(pages: Rows[Rows[int]], like: Tensor) -> np.ndarray:
    table = np.full(tuple(like.shape), SCRATCH, dtype=np.int64)
    for place, own in enumerate(pages):
        table[place, : len(own)] = own
    return table


def _write(target: Tensor, values: np.ndarray) -> None:
    target.copy_(_to_device(values, target.device))


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device without waiting for what it is doing."""
    tensor = torch.from_numpy(values)
    # from pinned memory the copy waits in line with the kernels; torch keeps the memory until then
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
