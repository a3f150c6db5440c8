"""AdamW by the dtype of its moments (`learner.moments`): float32, bfloat16, 8 bits."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from rlmed.core.config.schema import LearnerConfig
from rlmed.models.merging import round_stochastically

LIBRARY = "torchao"
"""Has an `AdamW8bit`; bitsandbytes' has a state of its own kind, which checkpoints do not know."""
SEED_STRIDE = 1_000_003


def make_adamw(parameters: Sequence[Tensor], config: LearnerConfig) -> torch.optim.Optimizer:
    """Return AdamW over float32 parameters.

    Raises:
        ValueError: for 8-bit moments without a library for them, or of sharded parameters.
    """
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.moments == "bfloat16":
        return HalfMoments(parameters, **settings)
    if config.moments == "8bit":
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise ValueError(
                "learner.moments=8bit works in one learner rank only: set cluster.learner_ranks=1 or "
                "learner.moments=bfloat16"
            )
        adamw_8bit: Any = _eight_bit()
        optimizer: torch.optim.Optimizer = adamw_8bit(parameters, **settings)
        return optimizer
    return torch.optim.AdamW(parameters, fused=True, **settings)


def has_eight_bits() -> bool:
    """Return whether `learner.moments=8bit` can be had here."""
    return importlib.util.find_spec(LIBRARY) is not None


def check_eight_bits() -> None:
    """Raise ValueError if `learner.moments=8bit` cannot be had here."""
    if not has_eight_bits():
        raise ValueError(
            "learner.moments=8bit needs torchao, which is not installed: pip install torchao, or use "
            "learner.moments=bfloat16"
        )


def _eight_bit() -> Any:
    check_eight_bits()
    return importlib.import_module(f"{LIBRARY}.optim").AdamW8bit


class HalfMoments(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with moments stored in bfloat16 and updated in float32.

    They are rounded stochastically, up or down by chance so that the mean is right (Gupta et al.
    2015, arXiv 1502.02551): with a decay of 0.999, most steps change the second moment by less than
    half of bfloat16's last bit, and rounding to nearest would never change it at all. Chance
    depends on the step and the parameter alone, so that a resumed run draws the same.
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        """Train `parameters`, float32."""
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(group, number, parameter)

    def _update(self, group: dict[str, Any], number: int, parameter: Tensor) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()
        adamw(
            [parameter],
            [gradient],
            [first],
            [second],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        seed = int(state["step"]) * SEED_STRIDE + 2 * number
        round_stochastically(local_of(first), local_of(state["exp_avg"]), seed)
        round_stochastically(local_of(second), local_of(state["exp_avg_sq"]), seed + 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()`; moments keep their dtype, unlike in torch's version."""
        moments = state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, entry in moments.items():
            self.state[parameters[number]] = dict(entry)


def local_of(tensor: Tensor) -> Tensor:
    """Return a rank's shard of a distributed tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
