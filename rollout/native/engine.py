"""Native rollout engine: one prefill per prompt, grouped decode, continuous batching, early return.

It computes with the learner's own parameters through shared-prefix attention, so its
log-probabilities agree with the learner's to rounding; which modules compute, `Policy.hidden`
decides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlmed.core.prefill import joined
from rlmed.core.types import RolloutGroup, RolloutRequest, SamplingParams
from rlmed.models.cpu.linear import PackedWeights
from rlmed.models.policy import Policy, merge_image_inputs
from rlmed.models.weights import Weights, copy_weights, gpu_name
from rollout.native.sampler import completion_seeds
from rollout.native.scheduler import EngineLimits, Scheduler
from rollout.native.sequence import Sequence, SequenceGroup
from rollout.native.slots import StepPlan, StepShape
from rollout.native.step import Decoder, Sampled

Decode = Callable[[list[int]], str]
"""Token ids to text, without special tokens."""


class NativeEngine:
    """Samples groups of completions from a policy.

    Example:
        >>> engine = NativeEngine(policy, tokenizer.decode)                         # doctest: +SKIP
        >>> engine.submit(RolloutRequest(index=0, prompt=prompt, group_size=8, sampling=SamplingParams()))  # doctest: +SKIP
        >>> while engine.busy: groups += engine.step()                              # doctest: +SKIP
    """

    def __init__(
        self, policy: Policy, decode: Decode, limits: EngineLimits | None = None, plan: StepPlan | None = None
    ) -> None:
        """Share `policy`'s parameters: the next token sees every optimizer step on them.

        `plan` is the one for the policy's device if not given.
        """
        self.policy = policy
        self.policy_version = 0
        self.generated_tokens = 0
        self.devices: tuple[str, ...] = tuple(filter(None, [gpu_name(policy.device)]))
        self._decode_text = decode
        self._limits = limits or EngineLimits()
        self._plan = plan or StepPlan.for_device(policy.device)
        self._scheduler = Scheduler(self._limits)
        self._groups: list[SequenceGroup] = []
        self._rows: list[Sequence] = []
        self._decoder: Decoder | None = None
        self._packs = PackedWeights()
        self._shape: StepShape | None = None
        self._finished: list[SequenceGroup] = []

    @property
    def busy(self) -> bool:
        """True while requests wait or run, or finished groups have not been returned."""
        return bool(self._rows or self._finished) or len(self._scheduler) > 0

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request; raises ValueError if it can never run."""
        self._scheduler.submit(request)

    def sleep(self) -> None:
        """Release the pages of keys and values if nothing runs."""
        if not self._rows:
            self._decoder = None

    def update_weights(self, version: int, weights: Weights = ()) -> None:
        """See `rollout.engine.Engine.update_weights`.

        Running completions continue: their keys and values stay those of the older weights, as
        `min_version` records.
        """
        self._read(leave=0)
        self._packs.clear()
        if weights:
            copy_weights(dict(self.policy.model.named_parameters()), weights, self.policy.device)
        if self._decoder is not None:
            self._decoder.settle_graphs()
        self.policy_version = version

    @torch.inference_mode()
    def step(self) -> list[RolloutGroup]:
        """Start what fits, sample a token per live completion; return the groups this finished.

        On CUDA, the tokens that end a group are those of the step before.
        """
        admitted = self._scheduler.admit(self._limits.max_completions - len(self._rows), running=bool(self._rows))
        leave = self._plan.lag
        if admitted:
            self._prefill(admitted)
        elif any(row.sampled < row.group.request.sampling.max_tokens for row in self._rows):
            self._decode()
        else:
            leave = 0
        self._read(leave=leave)
        finished, self._finished = self._finished, []
        return [group.to_rollout() for group in finished]

    def partial_texts(self, index: int) -> list[str]:
        """Return the texts so far of the running completions of the request with this index.

        A character of several tokens ends in a replacement character until its last one.
        """
        return [
            joined(row.group.request.prompt.prefill, self._decode_text(row.token_ids))
            for row in self._rows
            if row.group.request.index == index
        ]

    def abort(self) -> list[RolloutRequest]:
        """Drop all waiting and running work and return its requests."""
        requests = [group.request for group in (*self._finished, *self._groups)]
        while len(self._scheduler):
            requests += self._scheduler.admit(self._limits.max_completions)
        self._groups, self._rows, self._finished, self._decoder = [], [], [], None
        self._packs.clear()
        return requests

    def _prefill(self, requests: list[RolloutRequest]) -> None:
        """Compute prompts in one row, cache keys and values, sample completions' first tokens."""
        policy = self.policy
        groups = [SequenceGroup.of(request, policy.prompt_positions(request.prompt)) for request in requests]
        if self._decoder is None:
            self._decoder = Decoder(policy, self._limits, self._plan, position_rows=len(groups[0].positions))
        decoder = self._decoder
        decoder.reserve(requests)
        try:
            self._compute_prompts(requests, groups, decoder)
        except BaseException:
            self._forget(groups, decoder)
            raise

    def _compute_prompts(self, requests: list[RolloutRequest], groups: list[SequenceGroup], decoder: Decoder) -> None:
        policy, lengths = self.policy, [len(request.prompt.token_ids) for request in requests]
        rows = self._start(groups, decoder)
        tokens = torch.cat([torch.as_tensor(request.prompt.token_ids) for request in requests])
        layout = decoder.prompt_layout(lengths, [group.pages for group in groups], tokens)
        positions = torch.cat([group.positions for group in groups], dim=1).to(policy.device)
        images = merge_image_inputs([policy.image_inputs(request.prompt) for request in requests])
        with self._packs.active(products=False):
            hidden = policy.hidden(tokens.to(policy.device), positions, layout, images)
        last = torch.tensor(lengths, device=policy.device).cumsum(0) - 1
        logits = policy.logits(hidden[last])
        repeats = torch.tensor([request.group_size for request in requests], device=policy.device)
        self._groups += groups
        self._rows += rows
        self._shape = decoder.lay_out(self._rows, self._groups)
        logits = logits.repeat_interleave(repeats, dim=0, output_size=len(rows))
        decoder.first(rows, len(self._rows) - len(rows), logits, version=self.policy_version)

    def _forget(self, groups: list[SequenceGroup], decoder: Decoder) -> None:
        """Free what groups have taken whose prompts could not be computed, as without memory."""
        failed = {id(group) for group in groups}
        for group in groups:
            decoder.prefix.give_back(group.pages)
            for sequence in group.sequences:
                decoder.suffix.give_back(sequence.pages)
        self._groups = [group for group in self._groups if id(group) not in failed]
        self._rows = [row for row in self._rows if id(row.group) not in failed]
        self._shape = None

    def _start(self, groups: list[SequenceGroup], decoder: Decoder) -> list[Sequence]:
        """Make the groups' sequences and take pages for them; return the sequences."""
        rows: list[Sequence] = []
        for group in groups:
            sampling = group.request.sampling
            group.pages = decoder.prefix.take(group.positions.shape[1])
            for seed in completion_seeds(sampling.seed, group.request.group_size).tolist():
                pages = decoder.suffix.take(sampling.max_tokens)
                row = Sequence(group, seed, min_version=self.policy_version, sampled=1, pages=pages)
                group.sequences.append(row)
            rows += group.sequences
        return rows

    def _decode(self) -> None:
        """Run one forward pass over each live completion's newest token and sample the next."""
        decoder = self._decoder
        assert decoder is not None
        if self._shape is None:
            self._shape = decoder.lay_out(self._rows, self._groups)
        # a row's newest token is not cached yet; rows that the host does not know to have ended
        # stay at their limits
        longest = max(min(row.sampled, row.group.request.sampling.max_tokens) for row in self._rows)
        with self._packs.active():
            decoder.step(self._shape.widened(self._plan.width(longest)), self._rows, version=self.policy_version)
        for row in self._rows:
            row.sampled += 1

    @torch.inference_mode()
    def _read(self, *, leave: int) -> None:
        """Append the tokens of all steps but the last `leave`; free what has ended."""
        if self._decoder is None:
            return
        for sampled in self._decoder.read(leave=leave):
            self._append(sampled)
        self._retire(self._decoder)

    def _append(self, sampled: Sampled) -> None:
        """Append each running row's new token."""
        tokens, logprobs, ends = sampled.tokens.tolist(), sampled.logprobs.tolist(), self.policy.end_token_ids
        for sequence, token, logprob in zip(sampled.rows, tokens, logprobs, strict=True):
            if sequence.finish_reason is not None:
                continue  # sampled before the host knew
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.max_version = sampled.version
            self.generated_tokens += 1
            sampling = sequence.group.request.sampling
            if token in ends or sampling.stop or len(sequence.token_ids) >= sampling.max_tokens:
                self._finish(sequence, token, sampling)

    def _finish(self, sequence: Sequence, token: int, sampling: SamplingParams) -> None:
        """Set the finish reason and text if the new token ends its completion."""
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

    def _retire(self, decoder: Decoder) -> None:
        """Free the rows and pages of what has ended."""
        kept = [row for row, sequence in enumerate(self._rows) if sequence.finish_reason is None]
        if len(kept) == len(self._rows):
            return
        for sequence in self._rows:
            if sequence.finish_reason is not None:
                decoder.suffix.give_back(sequence.pages)
        ended = [group for group in self._groups if group.finished]
        for group in ended:
            decoder.prefix.give_back(group.pages)
        self._finished += ended
        self._groups = [group for group in self._groups if not group.finished]
        self._rows = [self._rows[row] for row in kept]
        self._shape = None
        if self._rows:
            decoder.slots.keep(kept)
        elif self._plan.graphs:
            decoder.clear()
        else:
            # release memory to the learner, and keep the next batch's arithmetic independent of
            # this one's
            self._decoder = None
            self._packs.clear()


def _cut_at_stop(text: str, stops: tuple[str, ...]) -> str:
    """Cut the text after the first stop string."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
