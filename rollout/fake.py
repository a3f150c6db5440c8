"""An engine without a model, for debugging the rest of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from rlmed.core.types import LETTERS, Completion, IntArray, RolloutGroup, RolloutRequest
from rlmed.models.weights import Weights

LOGPROB = -1.0
"""Log-probability of every token; metrics that compare it with the learner's are meaningless."""


class FakeEngine:
    """`rollout.engine.Engine` that writes well-formed answers, random letters, one group a step."""

    def __init__(self, encode: Callable[[str], IntArray]) -> None:
        """Encode completions with `encode`: text to token ids, end token included."""
        self.policy_version = 0
        self.devices: tuple[str, ...] = ()
        self.generated_tokens = 0
        self._encode = encode
        self._waiting: deque[RolloutRequest] = deque()

    @property
    def busy(self) -> bool:
        """True while requests wait."""
        return bool(self._waiting)

    def submit(self, request: RolloutRequest) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def step(self) -> list[RolloutGroup]:
        """Complete the oldest request."""
        if not self._waiting:
            return []
        request = self._waiting.popleft()
        random = np.random.default_rng(request.sampling.seed)
        # an example of another task has no options, and is never answered rightly
        options = request.prompt.example.options or ("nothing",)
        completions = tuple(
            self._completion(int(random.integers(len(options))), options, request) for _ in range(request.group_size)
        )
        self.generated_tokens += sum(len(completion.token_ids) for completion in completions)
        return [RolloutGroup(request, completions)]

    def abort(self) -> list[RolloutRequest]:
        """Drop the waiting requests and return them."""
        requests = list(self._waiting)
        self._waiting.clear()
        return requests

    def sleep(self) -> None:
        """No-op."""

    def update_weights(self, version: int, weights: Weights = ()) -> None:
        """Set the policy version."""
        self.policy_version = version

    def _completion(self, choice: int, options: tuple[str, ...], request: RolloutRequest) -> Completion:
        text = f"<think>The image shows {options[choice]}.</think><answer>{LETTERS[choice]}</answer>"
        token_ids = self._encode(text)[: request.sampling.max_tokens]
        logprobs = np.full(len(token_ids), LOGPROB, dtype=np.float32)
        version = self.policy_version
        whole = len(token_ids) < request.sampling.max_tokens
        return Completion(token_ids, logprobs, text, "stop" if whole else "length", version, version)
