"""AdamW on float32 master weights, whatever the policy's dtype, with a learning-rate schedule.

A bfloat16 weight has 8 significant bits, so an update of 1e-6 would vanish. The optimizer therefore
keeps float32 copies of half-precision parameters, accumulates their gradients in float32, and
rounds back after each step. A float32 parameter is its own master, without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.distributed import Parallelism, SingleProcess
from learner.moments import local_of, make_adamw
from rlmed.core.config.schema import LearnerConfig


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Return the factor on the peak learning rate at optimizer step `step` (from 0) of `total`.

    It rises linearly over `warmup` steps, then stays ("constant"), or falls to 0 at `total` along a
    line or half a cosine.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class _Pair:
    """A trained parameter and its float32 master; one tensor for float32 policies."""

    name: str
    parameter: Tensor
    master: Tensor


class Optimizer:
    """Gradient accumulation, clipping, AdamW (arXiv 1711.05101), schedule."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        config: LearnerConfig,
        total_steps: int,
        parallelism: Parallelism | None = None,
    ) -> None:
        """Train the parameters that require gradients.

        Args:
            named_parameters: the policy's, in its order.
            config: peak learning rate, schedule, AdamW and clipping.
            total_steps: length of the schedule.
            parallelism: of the ranks that shard the parameters; None: this process holds them all.
        """
        self._config, self._total_steps, self._parallelism = config, total_steps, parallelism or SingleProcess()
        self._pairs = [
            _Pair(name, parameter, _master(parameter))
            for name, parameter in named_parameters
            if parameter.requires_grad
        ]
        if not self._pairs:
            raise ValueError("no parameter requires gradients: learner.freeze leaves nothing to train")
        self.steps_taken = 0
        self.skipped_steps = 0
        self._adamw = make_adamw([pair.master for pair in self._pairs], config)

    @property
    def lr(self) -> float:
        """Return the learning rate of the next step."""
        factor = lr_factor(self.steps_taken, self._total_steps, self._config.warmup_steps, self._config.lr_schedule)
        return self._config.lr * factor

    def accumulate(self) -> None:
        """Move a backward pass's gradients to float32 accumulators; call after each micro-batch."""
        pairs = [p for p in self._pairs if p.master is not p.parameter and p.parameter.grad is not None]
        started = [pair for pair in pairs if pair.master.grad is not None]
        fresh = [pair for pair in pairs if pair.master.grad is None]
        for pair in fresh:
            pair.master.grad = torch.empty_like(pair.master)
        if fresh:
            torch._foreach_copy_(*_gradients(fresh))
        if started:
            torch._foreach_add_(*_gradients(started))
        for pair in pairs:
            pair.parameter.grad = None

    def step(self) -> float:
        """Clip the accumulated gradient by norm, update the weights, and clear the gradient.

        Returns:
            The gradient norm before clipping. If it is not finite, nothing was updated.
        """
        masters = [pair.master for pair in self._pairs if pair.master.grad is not None]
        gradients = [master.grad for master in masters if master.grad is not None]
        norm = self._parallelism.full_scalar(torch.nn.utils.get_total_norm(gradients))
        if torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(masters, self._config.max_grad_norm, norm)
            for group in self._adamw.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao's compiled update reads it from there
                    group["lr"].fill_(self.lr)
                else:
                    group["lr"] = self.lr
            self._adamw.step()
            self._write_back()
            self.steps_taken += 1
        self._adamw.zero_grad(set_to_none=True)
        return float(norm)

    def drop_gradients(self) -> None:
        """Discard the accumulated gradients."""
        self._adamw.zero_grad(set_to_none=True)
        for pair in self._pairs:
            pair.parameter.grad = None

    def skip(self) -> None:
        """Discard the accumulated gradients and count a skipped step."""
        self.drop_gradients()
        self.skipped_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return all but the policy's own parameters; with several ranks, tensors are shards."""
        masters = {pair.name: pair.master for pair in self._pairs if pair.master is not pair.parameter}
        return {
            "parameters": [pair.name for pair in self._pairs],
            "moments": self._config.moments,
            "adamw": self._adamw.state_dict(),
            "steps_taken": self.steps_taken,
            "skipped_steps": self.skipped_steps,
            "masters": masters,
        }

    @property
    def masters(self) -> dict[str, Tensor]:
        """Float32 masters by parameter; with several ranks, shards."""
        return {pair.name: pair.master for pair in self._pairs}

    def check(self, state: Mapping[str, Any]) -> None:
        """Check that a `state_dict()`, of which tensors may be absent, fits this optimizer.

        Raises:
            ValueError: naming the settings to resume with.
        """
        own = {pair.name for pair in self._pairs if pair.master is not pair.parameter}
        if state["parameters"] != [pair.name for pair in self._pairs] or own != set(state["masters"]):
            raise ValueError(
                "the optimizer's state holds other parameters: resume with the same model.dtype and learner.freeze"
            )
        saved = state.get("moments", "float32")  # absent from files of earlier versions
        if saved != self._config.moments:
            raise ValueError(
                f"the optimizer's state has {saved} moments: resume with learner.moments={saved}, not {self._config.moments}"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict()` that fits (see `check`), with tensors sharded as here.

        The caller loads the policy's parameters.
        """
        with torch.no_grad():
            for pair in self._pairs:
                if pair.name in state["masters"]:
                    pair.master.copy_(state["masters"][pair.name])
        self._adamw.load_state_dict(state["adamw"])
        self.steps_taken = int(state["steps_taken"])
        # absent from files of earlier versions
        self.skipped_steps = int(state.get("skipped_steps", 0))

    @torch.no_grad()
    def _write_back(self) -> None:
        pairs = [pair for pair in self._pairs if pair.master is not pair.parameter]
        if pairs:
            torch._foreach_copy_([local_of(p.parameter) for p in pairs], [local_of(p.master) for p in pairs])


def _gradients(pairs: Sequence[_Pair]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the float32 accumulators of pairs, and the gradients to put into them."""
    found = [(pair.master.grad, pair.parameter.grad) for pair in pairs]
    return [local_of(into) for into, _ in found if into is not None], [
        local_of(new) for _, new in found if new is not None
    ]


def _master(parameter: Tensor) -> Tensor:
    return parameter if parameter.dtype == torch.float32 else parameter.detach().float()
