"""A policy without a model, to test the engine around it: each token names its successors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch

from rlmed.core.types import Example, Prompt, RolloutRequest, SamplingParams
from rlmed.models.attention import PackedLayout
from rlmed.models.decode_kernels import DecodeKernels

VOCABULARY = 64
END = 0


class ChainPolicy:
    """Stands in for `rlmed.models.policy.Policy`: after t come `successors[t]`, equally likely."""

    def __init__(self, successors: Mapping[int, Sequence[int]]) -> None:
        """Tokens without an entry are followed by the next number."""
        self.successors = successors
        self.device, self.dtype, self.kv_shape = torch.device("cpu"), torch.float32, (1, 1, 2)
        self.end_token_ids, self.windows = frozenset([END]), ()
        self.projection = torch.nn.Linear(1, VOCABULARY, bias=False)

    def image_inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        return {}

    def prompt_positions(self, prompt: Prompt) -> torch.Tensor:
        return torch.arange(len(prompt.token_ids))[None]

    def decode_kernels(self) -> DecodeKernels:
        return DecodeKernels()

    def packed_layout(self, groups: Sequence[tuple[int, Sequence[int]]], token_ids: torch.Tensor) -> PackedLayout:
        return PackedLayout.build(groups)

    def hidden(self, token_ids, positions, layout, image_inputs=None) -> torch.Tensor:
        assert positions.shape == (1, len(token_ids))
        return token_ids[:, None].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(hidden), VOCABULARY), float("-inf"))
        for row, token in enumerate(hidden[:, 0].long().tolist()):
            logits[row, list(self.successors.get(token, [token + 1]))] = 0.0
        return logits


@pytest.fixture
def chain() -> Callable[..., ChainPolicy]:
    """`chain({5: [6, 7]})`: a policy in which 6 or 7 follows 5, and otherwise n + 1 follows n."""
    return lambda successors=None: ChainPolicy(successors or {})


@pytest.fixture
def make_request() -> Callable[..., RolloutRequest]:
    """`make_request(3, start=7, length=4)`: a request; its prompt of 4 tokens ends with token 7."""

    def make(
        index: int = 0, *, start: int = 1, length: int = 2, group_size: int = 1, **sampling: object
    ) -> RolloutRequest:
        token_ids = np.full(length, start, dtype=np.int64)
        prompt = Prompt(Example(f"q{index}", None, "?", ("a", "b"), 0), "", token_ids)
        return RolloutRequest(index, prompt, group_size, SamplingParams(**{"seed": index, **sampling}))  # type: ignore[arg-type]

    return make
