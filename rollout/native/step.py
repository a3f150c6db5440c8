"""The decode step: one forward pass over the newest token of each row, and the next token of each.

`decode_step` needs nothing from the host, so that on CUDA it is captured once per shape and
replayed as one graph, while the host reads the tokens of the step before.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlmed.core.types import RolloutRequest
from rlmed.models.attention import AttentionLayout
from rlmed.models.decode_kernels import DecodeKernels, Step, StepPages
from rlmed.models.decoder import LayersLayout
from rlmed.models.policy import Policy
from rollout.native.kv_pages import DecodeLayout, FixedPart, PagePool, PageView, PrefillLayout, visible, within
from rollout.native.sampler import BatchSampling
from rollout.native.scheduler import EngineLimits
from rollout.native.sequence import Sequence, SequenceGroup
from rollout.native.slots import Slots, StepPlan, StepShape

TORCH = DecodeKernels()
"""No kernels: all of a step in torch's operators."""


def decode_step(
    policy: Policy,
    slots: Slots,
    prefix: PagePool,
    suffix: PagePool,
    shape: StepShape,
    fixed: FixedPart | KernelPart | None = None,
    kernels: DecodeKernels = TORCH,
) -> None:
    """Sample the next token of each row; all that it reads and writes is in `slots` and the pages.

    `fixed` is that part of the layout, if an earlier step has made it since `Slots.lay_out`.
    """
    rows = slice(shape.rows)
    fixed = fixed or fixed_part(slots, prefix, suffix, shape, kernels)
    if isinstance(fixed, KernelPart):
        assert policy.decoder is not None, "kernels compute what it does"
        fixed.pages.counts.copy_(slots.counts[rows])
        hidden = fixed.step(policy.decoder.embeddings(slots.tokens[rows]), slots.positions(rows))
    else:
        layout = _layout(slots, suffix, shape, fixed, policy.windows)
        hidden = policy.hidden(slots.tokens[rows], slots.positions(rows), layout)
    logits = (kernels.project or policy.logits)(hidden)
    if kernels.sample is not None and not (shape.uses.top_k or shape.uses.top_p):
        tokens, logprobs = kernels.sample(logits, *slots.draws(rows))
    else:
        tokens, logprobs = slots.sampling(shape).sample(logits, slots.next_uniforms(rows))
    slots.record(rows, tokens, logprobs)


@dataclass(frozen=True, slots=True)
class KernelPart:
    """The part of a kernels' step that stays until rows come or go."""

    pages: StepPages
    step: Step


def fixed_part(
    slots: Slots, prefix: PagePool, suffix: PagePool, shape: StepShape, kernels: DecodeKernels
) -> FixedPart | KernelPart:
    """Lay out what stays until rows come or go."""
    if kernels.decoder is not None:
        pages = slots.step_pages(prefix, suffix, shape)
        return KernelPart(pages, kernels.decoder.lay_out(pages))
    groups, width = slice(shape.groups), shape.prefix_width
    prompts = prefix.head_rows(slots.prefix_pages[groups])
    return FixedPart(
        prefix=PageView.build(prefix, prompts, width, in_order=shape.groups_in_order),
        prefix_mask=visible(slots.prefix_lengths[groups], width, prefix),
        table=slots.group_table(shape),
        completions=suffix.head_rows(slots.suffix_pages[: shape.rows]),
    )


def _layout(
    slots: Slots, suffix: PagePool, shape: StepShape, fixed: FixedPart, windows: Rows[int] = ()
) -> DecodeLayout:
    addresses: Tensor | int = shape.suffix_width - 1
    mask = None
    if not shape.level:
        counts = slots.counts[: shape.rows]
        addresses = suffix.addresses(fixed.completions, counts - 1)
        mask = visible(counts, shape.suffix_width, suffix)
    view = PageView.build(suffix, fixed.completions, shape.suffix_width, in_order=shape.rows_in_order)
    masks = {
        width: within(width, slots.prompt_lengths(shape), slots.counts[: shape.rows], fixed.table, fixed.prefix, view)
        for width in windows
        if width < shape.prefix_width + shape.suffix_width
    }
    return DecodeLayout(fixed, view, addresses, mask, masks)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens of one step in the host's memory."""

    rows: Rows[Sequence]
    version: int
    """Of the weights that sampled them."""
    tokens: Tensor
    """int64 [R]."""
    logprobs: Tensor
    """float32 [R]."""
    arrived: torch.cuda.Event | None
    """When both are right; None: now."""


class Decoder:
    """Device side of an engine: state, pages and graphs of its decode steps.

    Example:
        >>> decoder = Decoder(policy, EngineLimits(), StepPlan.for_device(policy.device), 3)  # doctest: +SKIP
        >>> decoder.reserve(requests)                                                         # doctest: +SKIP
        >>> shape = decoder.lay_out(rows, groups)                                             # doctest: +SKIP
        >>> decoder.step(shape, rows, version=0)                                              # doctest: +SKIP
        >>> for sampled in decoder.read(): print(sampled.tokens)                              # doctest: +SKIP
    """

    def __init__(self, policy: Policy, limits: EngineLimits, plan: StepPlan, position_rows: int) -> None:
        """Make the state for `limits.max_completions` rows; pages come with `reserve`."""
        self.plan = plan
        self._policy, self._limits = policy, limits
        size, device = limits.max_completions, policy.device
        self.slots = Slots(policy, plan, size, position_rows)
        self.kernels = policy.decode_kernels() if plan.kernels else TORCH
        self.prefix, self.suffix = (
            PagePool(
                policy.kv_shape,
                page_tokens=plan.page_tokens,
                dtype=policy.dtype,
                device=device,
                transposed_keys=self.kernels.compiled,
            )
            for _ in range(2)
        )
        self._prompt_tokens = self._completion_tokens = 0
        self._graphs = StepGraphs() if plan.graphs else None
        pinned = device.type == "cuda"
        self._ring = [
            (torch.zeros(size, dtype=torch.int64, pin_memory=pinned), torch.zeros(size, pin_memory=pinned))
            for _ in range(plan.lag + 1)
        ]
        self._sent: deque[Sampled] = deque()
        self._turn = 0
        self._fixed: FixedPart | KernelPart | None = None

    def reserve(self, requests: Rows[RolloutRequest]) -> None:
        """Make room for these requests beside what runs; `lay_out` comes next."""
        limits = self._limits
        prompt = max(len(request.prompt.token_ids) for request in requests)
        completion = max(request.sampling.max_tokens for request in requests)
        rows, groups, most_rows, most_groups = sum(request.group_size for request in requests), len(requests), 0, 0
        if self.plan.buckets:
            # growing moves the pages, which costs every graph: so make room for the most at once
            most_rows, prompt = limits.max_completions, max(prompt, limits.max_prompt_tokens)
            most_groups = most_rows // max(request.group_size for request in requests)
        self.prefix.reserve(sequences=groups, tokens=prompt, most=most_groups)
        self.suffix.reserve(sequences=rows, tokens=completion, most=most_rows)
        if prompt > self._prompt_tokens or completion > self._completion_tokens:
            self._prompt_tokens = max(prompt, self._prompt_tokens)
            self._completion_tokens = max(completion, self._completion_tokens)
            self.slots.widen(
                self.prefix.pages_for(self.plan.width(self._prompt_tokens)),
                self.suffix.pages_for(self.plan.width(self._completion_tokens)),
                self._completion_tokens,
            )
        self.settle_graphs()

    def settle_graphs(self) -> None:
        """Forget the graphs if memory that they read has moved: they know addresses only."""
        if self._graphs is not None:
            pages = (*self.prefix.keys, *self.prefix.values, *self.suffix.keys, *self.suffix.values)
            tensors = (*self.slots.tensors(), *pages, *self._policy.model.parameters())
            self._graphs.keep_if(tuple(tensor.data_ptr() for tensor in tensors))

    def clear(self) -> None:
        """Free nothing, but forget what is in the pages, once nothing runs."""
        self._sent.clear()
        self.prefix.clear()
        self.suffix.clear()

    def first(self, rows: Rows[Sequence], start: int, logits: Tensor, version: int) -> None:
        """Sample the first tokens of new rows, from row `start` on; send them to the host.

        `logits` are float32 [R, V].
        """
        device, span = logits.device, slice(start, start + len(rows))
        sampling = BatchSampling.build([row.group.request.sampling for row in rows], logits.shape[1], device)
        uniform = self.slots.begin(span, torch.tensor([row.seed for row in rows], device=device))
        self.slots.record(span, *sampling.sample(logits, uniform))
        self._send(rows, start, version)

    def step(self, shape: StepShape, rows: Rows[Sequence], version: int) -> None:
        """Run a decode step and send its tokens to the host."""
        if self._graphs is not None:
            self._graphs.run(shape, self._decode)
        else:
            if self.kernels.decoder is None or self.kernels.compiled:
                self._fixed = self._fixed or fixed_part(self.slots, self.prefix, self.suffix, shape, self.kernels)
            self._decode(shape, self._fixed)
        self._send(rows, 0, version)

    def _decode(self, shape: StepShape, fixed: FixedPart | KernelPart | None = None) -> None:
        decode_step(self._policy, self.slots, self.prefix, self.suffix, shape, fixed, self.kernels)

    def prompt_layout(
        self, lengths: Rows[int], pages: Rows[Rows[int]], token_ids: Tensor
    ) -> AttentionLayout | LayersLayout:
        """Lay out prompts of these lengths one after the other, each in its pages of `prefix`.

        `token_ids` are all of them, int64 [N] on the CPU.
        """
        if self.kernels.prompts is None or self._policy.family.both_ways:
            packed = self._policy.packed_layout([(length, ()) for length in lengths], token_ids)
            return PrefillLayout.build(lengths, pages, packed, self.prefix)
        firsts = list(itertools.accumulate(lengths, initial=0))[:-1]
        return self.kernels.prompts.lay_out_prompts(
            StepPages(
                prefix=(self.prefix.keys, self.prefix.values),
                suffix=(self.suffix.keys, self.suffix.values),
                prefix_pages=pad_sequence([torch.tensor(own, dtype=torch.int32) for own in pages], batch_first=True),
                prefix_lengths=torch.tensor(lengths, dtype=torch.int32),
                members=torch.tensor(firsts, dtype=torch.int32).unsqueeze(1),
                suffix_pages=torch.zeros(1, 1, dtype=torch.int32),
                counts=torch.zeros(sum(lengths), dtype=torch.int32),
                widths=(max(lengths), 0),
            )
        )

    def lay_out(self, rows: Rows[Sequence], groups: Rows[SequenceGroup]) -> StepShape:
        """See `Slots.lay_out`."""
        self._fixed = None
        return self.slots.lay_out(rows, groups)

    def _send(self, rows: Rows[Sequence], start: int, version: int) -> None:
        """Copy the newest tokens to the host, without waiting for them."""
        # an entry's turn comes again only after it has been read
        tokens, logprobs = (buffer[: len(rows)] for buffer in self._ring[self._turn])
        self._turn = (self._turn + 1) % len(self._ring)
        span = slice(start, start + len(rows))
        tokens.copy_(self.slots.tokens[span], non_blocking=True)
        logprobs.copy_(self.slots.logprobs[span], non_blocking=True)
        arrived = None
        if self.slots.tokens.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._sent.append(Sampled(rows, version, tokens, logprobs, arrived))

    @property
    def unread(self) -> int:
        """Number of steps whose tokens the host has not read."""
        return len(self._sent)

    def read(self, *, leave: int = 0) -> Iterator[Sampled]:
        """Yield the tokens of all steps but the last `leave`, oldest first; wait for them."""
        while len(self._sent) > leave:
            sampled = self._sent.popleft()
            if sampled.arrived is not None:
                sampled.arrived.synchronize()
            yield sampled


class StepGraphs:
    """One CUDA graph for each shape of step, captured when the shape comes for the second time."""

    def __init__(self) -> None:
        """Start without graphs."""
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._seen: set[StepShape] = set()
        self._addresses: tuple[int, ...] = ()
        self._pool: Any = None

    def keep_if(self, addresses: tuple[int, ...]) -> None:
        """Keep the graphs if captured with tensors at these addresses, else forget them."""
        if addresses != self._addresses:
            self._graphs.clear()
            # other tables may need other variants of the kernels, and a capture cannot compile them
            self._seen.clear()
            self._pool, self._addresses = None, addresses

    def run(self, shape: StepShape, step: Callable[[StepShape], None]) -> None:
        """Take a step of this shape: as it is, which warms it up, or as a graph."""
        if shape not in self._seen:
            self._seen.add(shape)
            step(shape)
            return
        graph = self._graphs.get(shape)
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # other threads may use the device meanwhile, for example to load an image
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step(shape)
            # the graphs run one after the other, so they share their working memory
            self._pool = graph.pool()
            self._graphs[shape] = graph
        graph.replay()
