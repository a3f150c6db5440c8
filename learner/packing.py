"""Pack prompts with their completions into rows; split them under a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlmed.core.types import Completion, Prompt
from rlmed.models.attention import AttentionLayout
from rlmed.models.policy import Policy, merge_image_inputs


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """A completion to train on."""

    completion: Completion
    advantage: float
    trained: bool = True
    """False excludes the completion from the loss, as when it is truncated at the length limit."""


@dataclass(frozen=True, slots=True)
class PackItem:
    """A prompt and some or all completions of its group."""

    prompt: Prompt
    sequences: tuple[TrainSequence, ...]

    @property
    def tokens(self) -> int:
        """Number of row tokens.

        A completion's last token is predicted but never fed to the model.
        """
        return len(self.prompt.token_ids) + sum(len(entry.completion.token_ids) - 1 for entry in self.sequences)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: a row of N tokens with S completions and M predicted tokens.

    Example:
        A prompt of 49 tokens with completions of 13 and 31 tokens: N = 49 + 12 + 30 = 91, S = 2, M
            = 44.
    """

    token_ids: Tensor
    """int64 [N]."""
    positions: Tensor
    """int64 [R, N] rotary positions; R as in `Policy.prompt_positions`."""
    layout: AttentionLayout
    image_inputs: dict[str, Tensor]
    predictors: Tensor
    """int64 [M]: row index of the token whose hidden state predicts each target."""
    targets: Tensor
    """int64 [M]: the completions' tokens, concatenated."""
    sequence_ids: Tensor
    """int64 [M]: 0..S-1."""
    rollout_logprobs: Tensor
    """float32 [M]."""
    loss_mask: Tensor
    """bool [M]."""
    advantages: Tensor
    """float32 [S]."""


def split_by_tokens(items: Iterable[PackItem], token_budget: int) -> list[list[PackItem]]:
    """Split items into micro-batches of at most `token_budget` row tokens, in order.

    A group that exceeds the budget is split into several items with the same prompt; a single
    completion that exceeds it forms its own micro-batch.
    """
    micro_batches: list[list[PackItem]] = []
    room = 0
    for item in items:
        for part in _split_group(item, token_budget):
            if not micro_batches or part.tokens > room:
                micro_batches.append([])
                room = token_budget
            micro_batches[-1].append(part)
            room -= part.tokens
    return micro_batches


def _split_group(item: PackItem, token_budget: int) -> list[PackItem]:
    if item.tokens <= token_budget or len(item.sequences) == 1:
        return [item]
    return [part for half in halves(item) for part in _split_group(half, token_budget)]


def halves(item: PackItem) -> tuple[PackItem, PackItem]:
    """Split a group's completions into two items with the same prompt."""
    half = len(item.sequences) // 2
    return PackItem(item.prompt, item.sequences[:half]), PackItem(item.prompt, item.sequences[half:])


def pack(
    items: Sequence[PackItem], policy: Policy, prompt_positions: Callable[[Prompt], Tensor] | None = None
) -> PackedBatch:
    """Build the row of one micro-batch on the policy's device.

    Args:
        items: groups or parts of groups; every completion has at least one token.
        policy: supplies positions and device.
        prompt_positions: replaces `policy.prompt_positions`, for example by a cached version.

    Raises:
        ValueError: for an empty completion.
    """
    positions_of = prompt_positions or policy.prompt_positions
    token_ids, positions, predictors, targets, sequence_ids = [], [], [], [], []
    shapes: list[tuple[int, list[int]]] = []
    row = 0
    sequences = [sequence for item in items for sequence in item.sequences]
    number = 0
    for item in items:
        prompt_length = len(item.prompt.token_ids)
        prompt_position = positions_of(item.prompt)
        next_position = int(prompt_position.max()) + 1
        token_ids.append(torch.as_tensor(item.prompt.token_ids))
        positions.append(prompt_position)
        last_prompt_token = row + prompt_length - 1
        row += prompt_length
        lengths = []
        for sequence in item.sequences:
            ids = torch.as_tensor(sequence.completion.token_ids)
            if len(ids) == 0:
                raise ValueError(f"a completion of prompt {item.prompt.example.id!r} has no tokens")
            fed = len(ids) - 1
            token_ids.append(ids[:-1])
            positions.append(torch.arange(next_position, next_position + fed).expand(len(prompt_position), -1))
            predictors += [torch.tensor([last_prompt_token]), torch.arange(row, row + fed)]
            targets.append(ids)
            sequence_ids.append(torch.full((len(ids),), number))
            if fed:
                lengths.append(fed)
            row, number = row + fed, number + 1
        shapes.append((prompt_length, lengths))
    device, row_ids = policy.device, torch.cat(token_ids)
    masks = [np.full(len(sequence.completion.token_ids), sequence.trained) for sequence in sequences]
    rollout_logprobs = np.concatenate([sequence.completion.rollout_logprobs for sequence in sequences])
    return PackedBatch(
        token_ids=row_ids.to(device),
        positions=torch.cat(positions, dim=1).to(device),
        layout=policy.packed_layout(shapes, row_ids),
        image_inputs=merge_image_inputs([policy.image_inputs(item.prompt) for item in items]),
        predictors=torch.cat(predictors).to(device),
        targets=torch.cat(targets).to(device),
        sequence_ids=torch.cat(sequence_ids).to(device),
        rollout_logprobs=torch.as_tensor(rollout_logprobs, dtype=torch.float32, device=device),
        loss_mask=torch.as_tensor(np.concatenate(masks), device=device),
        advantages=torch.tensor([sequence.advantage for sequence in sequences], dtype=torch.float32, device=device),
    )


def packed_logprobs(policy: Policy, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Return float32 [M] log-probabilities of the targets (differentiable) and [M] entropies."""
    return policy.logprobs(_predicting(policy, batch), batch.targets, temperature)


@torch.no_grad()
def logprobs_no_grad(policy: Policy, batch: PackedBatch, temperature: float) -> Tensor:
    """Return only the log-probabilities of `packed_logprobs`, without gradient."""
    return policy.logprobs_no_grad(_predicting(policy, batch), batch.targets, temperature)


def _predicting(policy: Policy, batch: PackedBatch) -> Tensor:
    """Return the [M, d] hidden states that predict the targets."""
    hidden = policy.hidden(batch.token_ids, batch.positions, batch.layout, batch.image_inputs)
    return hidden.index_select(0, batch.predictors)
