"""Native rollout engine: one prefill per prompt, grouped decode, continuous batching, groups returned as they finish.

It runs the learner's own modules through shared-prefix attention, so it needs no model code of its own, and its
log-probabilities agree with the learner's to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlmed.core.prefill import joined
from rlmed.core.types import RolloutGroup, RolloutRequest
from rlmed.models.cpu.linear import PackedWeights
from rlmed.models.direct import DirectReceiver
from rlmed.models.policy import Policy, merge_image_inputs
from rlmed.models.weights import Buckets, copy_weights, gpu_name
from rollout.native.batch import DecodeBatch
from rollout.native.kv_cache import KVCache, PrefillLayout
from rollout.native.sampler import BatchSampling, completion_seeds
from rollout.native.scheduler import EngineLimits, Scheduler
from rollout.native.sequence import Sequence, SequenceGroup

Decode = Callable[[list[int]], str]
"""Token ids to text, without special tokens."""


class NativeEngine:
    """Samples groups of completions from a policy.

    Example:
        >>> engine = NativeEngine(policy, tokenizer.decode)                         # doctest: +SKIP
        >>> engine.submit(RolloutRequest(index=0, prompt=prompt, group_size=8, sampling=SamplingParams()))  # doctest: +SKIP
        >>> while engine.busy: groups += engine.step()                              # doctest: +SKIP
    """

    def __init__(self, policy: Policy, decode: Decode, limits: EngineLimits | None = None) -> None:
        """Share `policy`'s parameters: the next token sees every optimizer step on them."""
        self.policy = policy
        self.policy_version = 0
        self.generated_tokens = 0
        self.devices: tuple[str, ...] = tuple(filter(None, [gpu_name(policy.device)]))
        self._receiver: DirectReceiver | None = None
        self._decode_text = decode
        self._limits = limits or EngineLimits()
        self._scheduler = Scheduler(self._limits)
        self._groups: list[SequenceGroup] = []
        self._rows: list[Sequence] = []
        self._cache: KVCache | None = None
        self._batch: DecodeBatch | None = None
        self._packs = PackedWeights()

    @property
    def busy(self) -> bool:
        """True while requests wait or run."""
        return bool(self._rows) or len(self._scheduler) > 0

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request; raises ValueError if it can never run."""
        self._scheduler.submit(request)

    def sleep(self) -> None:
        """No-op."""

    def update_weights(self, version: int, buckets: Buckets = ()) -> None:
        """See `rollout.engine.Engine.update_weights`.

        Running completions continue: their keys and values stay those of the older weights, as
        `min_version` records.
        """
        self._packs.clear()
        if buckets:
            copy_weights(dict(self.policy.model.named_parameters()), buckets)
        self.policy_version = version

    def connect(self, transport: str, info: Mapping[str, Any]) -> None:
        """Connect to the learner; see `rlmed.core.weights.STAGES`."""
        if self._receiver is None:
            self._receiver = DirectReceiver(dict(self.policy.model.named_parameters()), self.policy.device)
        self._receiver.connect(transport, info)

    def begin_update(self) -> None:
        """Prepare for weights that the learner sends; no step is made until `finish_update`."""
        assert self._receiver is not None, "connect first"
        self._packs.clear()
        self._receiver.begin_update()

    def receive(self, info: Mapping[str, Any]) -> None:
        """Receive some of them; raises WeightError for weights of another model."""
        assert self._receiver is not None, "connect first"
        self._receiver.receive(info)

    def finish_update(self, version: int) -> None:
        """Sample from them as `version`; raises WeightError if some are missing."""
        assert self._receiver is not None, "connect first"
        self._receiver.finish_update()
        self.update_weights(version)

    @torch.inference_mode()
    def step(self) -> list[RolloutGroup]:
        """Start what fits, sample one token per live completion and return the groups this finished."""
        admitted = self._scheduler.admit(self._limits.max_completions - len(self._rows))
        if admitted:
            self._prefill(admitted)
        elif self._rows:
            self._decode()
        else:
            return []
        finished = [group for group in self._groups if group.finished]
        self._retire()
        return [group.to_rollout() for group in finished]

    def abort(self) -> list[RolloutRequest]:
        """Drop all waiting and running work and return its requests."""
        requests = [group.request for group in self._groups]
        while len(self._scheduler):
            requests += self._scheduler.admit(self._limits.max_completions)
        self._groups, self._rows, self._cache, self._batch = [], [], None, None
        self._packs.clear()
        return requests

    def _prefill(self, requests: list[RolloutRequest]) -> None:
        """Compute the prompts in one row, cache their keys and values, and sample each completion's first token."""
        policy = self.policy
        groups = [SequenceGroup(request, policy.prompt_positions(request.prompt)) for request in requests]
        lengths = [len(request.prompt.token_ids) for request in requests]
        cache = self._reserve(requests)
        layout = PrefillLayout.build(lengths, policy, cache, len(self._groups))
        tokens = torch.cat([torch.as_tensor(request.prompt.token_ids) for request in requests]).to(policy.device)
        positions = torch.cat([group.positions for group in groups], dim=1).to(policy.device)
        images = merge_image_inputs([policy.image_inputs(request.prompt) for request in requests])
        hidden = policy.hidden(tokens, positions, layout, images)
        last = torch.tensor(lengths, device=policy.device).cumsum(0) - 1
        logits = policy.logits(hidden[last])
        rows: list[Sequence] = []
        for group in groups:
            seeds = completion_seeds(group.request.sampling.seed, group.request.group_size).tolist()
            group.sequences = [Sequence(group, seed, min_version=self.policy_version) for seed in seeds]
            rows += group.sequences
        repeats = torch.tensor([group.request.group_size for group in groups], device=policy.device)
        self._groups += groups
        self._rows += rows
        self._batch = None
        sampling = BatchSampling.build(
            [row.group.request.sampling for row in rows], [row.seed for row in rows], logits.shape[1], logits.device
        )
        first = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
        self._append(rows, *sampling.sample(logits.repeat_interleave(repeats, dim=0), first))

    def _decode(self) -> None:
        """Run one forward pass over the newest token of each live completion and sample the next."""
        if self._batch is None:
            self._batch = DecodeBatch.build(self._rows, self._groups, self.policy)
        assert self._cache is not None
        batch = self._batch
        with self._packs.active():
            hidden = self.policy.hidden(batch.tokens, batch.positions, batch.layout(self._cache))
            logits = self.policy.logits(hidden)
        tokens, logprobs = batch.sampling.sample(logits, batch.lengths + 1)
        batch.advance(tokens)
        self._append(self._rows, tokens, logprobs)

    def _append(self, rows: list[Sequence], tokens: Tensor, logprobs: Tensor) -> None:
        """Append each row's new token."""
        for sequence, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.max_version = self.policy_version
            self._finish(sequence, token)
        self.generated_tokens += len(rows)

    def _finish(self, sequence: Sequence, token: int) -> None:
        """Set the finish reason and text if the new token ends its completion."""
        sampling = sequence.group.request.sampling
        stopped = token in self.policy.end_token_ids
        if not stopped and sampling.stop:
            # a stop string ends in the new token, so searching the tail suffices (each token is at
            # least one byte)
            reach = 4 * max(len(stop) for stop in sampling.stop) + 1
            stopped = any(stop in self._decode_text(sequence.token_ids[-reach:]) for stop in sampling.stop)
        if stopped:
            sequence.finish_reason = "stop"
        elif len(sequence.token_ids) >= sampling.max_tokens:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            ended = token in self.policy.end_token_ids
            # an end token is dropped even if the tokenizer treats it as text
            written = self._decode_text(sequence.token_ids[:-1] if ended else sequence.token_ids)
            prompt = sequence.group.request.prompt
            sequence.text = joined(prompt.prefill, _cut_at_stop(written, sampling.stop))

    def _retire(self) -> None:
        """Free the rows of finished completions and the slots of finished groups by moving the last ones into them."""
        cache = self._cache
        assert cache is not None
        for row in reversed([i for i, sequence in enumerate(self._rows) if sequence.finish_reason is not None]):
            last = self._rows.pop()
            if row < len(self._rows):
                cache.move_row(len(self._rows), row, len(last.token_ids) - 1)
                self._rows[row] = last
            self._batch = None
        for slot in reversed([i for i, group in enumerate(self._groups) if group.finished]):
            last_group = self._groups.pop()
            if slot < len(self._groups):
                cache.move_group(len(self._groups), slot)
                self._groups[slot] = last_group
        if not self._rows:
            # release memory to the learner, and keep the next batch's arithmetic independent of
            # this one's
            self._cache = None
            self._packs.clear()

    def _reserve(self, requests: list[RolloutRequest]) -> KVCache:
        """Return a cache with room for the requests beside what runs."""
        if self._cache is None:
            self._cache = KVCache(self.policy.kv_shape, dtype=self.policy.dtype, device=self.policy.device)
        self._cache.reserve(
            groups=len(self._groups) + len(requests),
            prompt_length=max(len(request.prompt.token_ids) for request in requests),
            rows=len(self._rows) + sum(request.group_size for request in requests),
            max_tokens=max(request.sampling.max_tokens for request in requests),
        )
        return self._cache


def _cut_at_stop(text: str, stops: tuple[str, ...]) -> str:
    """Cut the text after the first stop string."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
