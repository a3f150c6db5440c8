"""Choose the largest settings of a run that fit a GPU, by the estimate of its memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlmed.cluster.capacity import MARGIN, Estimate, free_memory, local_estimate, model_size, rank_estimate
from rlmed.cluster.memory import GIB, PROCESS_BYTES
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.models.loading import resolve_device, resolve_dtype

LEARNERS = (("adamw", "float32"), ("adamw", "bfloat16"), ("lora", "float32"))
"""Options of `learner` with `learner.moments`, the most demanding first."""
COMPLETIONS = (128, 64, 32, 16)
"""Values of `rollout.max_completions`."""
BUDGETS = (32768, 16384, 8192, 4096, 2048)
"""Values of `learner.token_budget`."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """Settings that fit, and what they need."""

    groups: dict[str, str]
    """Options of configuration groups."""
    keys: dict[str, object]
    bytes: int
    """Peak of a process, by the estimate."""


def fit(overrides: list[str], *, gpu_gib: float | None, gpus: int = 1) -> Fitting:
    """Return the largest settings of `rlmed.launch` with `overrides` that fit.

    Preferred in this order: weights rather than adapters, moments in float32, kept activations,
    many completions at a time, a large token budget.

    Args:
        overrides: as on the command line, without shorthands; they name the model.
        gpu_gib: memory of each GPU in GiB, of which a tenth is left free; None for this machine's
            CPU and memory.
        gpus: several use `cluster=ray_8gpu`.

    Raises:
        ValueError: if nothing fits; says what the smallest settings need.
    """
    on_cpu = gpu_gib is None
    groups = {"cluster": "ray_8gpu"} if gpus > 1 else {}
    base = [*overrides, *(f"{key}={value}" for key, value in groups.items())]
    size = model_size(compose_config("train", base))
    available = free_memory(resolve_device(compose_config("train", [*base, "model.device=cpu"]).model)) if on_cpu else 0
    room = (available or 0) if on_cpu else int((gpu_gib or 0) * GIB / MARGIN)
    composed = {name: compose_config("train", [*base, f"learner={name}"]) for name in ("adamw", "lora")}

    estimate = (
        rank_estimate(size, on_cpu=on_cpu) if gpus > 1 else local_estimate(size, engines=1, pictures=0, on_cpu=on_cpu)
    )

    def need(learner: str, keys: Mapping[str, object]) -> int:
        return _need(_with(composed[learner], keys), estimate, on_cpu=on_cpu)

    for learner, keys in _settings(on_cpu=on_cpu):
        needed = need(learner, keys)
        if needed <= room or (on_cpu and available is None):
            return Fitting(groups | {"learner": learner}, keys, needed)
    least = min(need(learner, keys) for learner, keys in _settings(on_cpu=on_cpu))
    raise ValueError(
        f"no settings fit: the smallest need {least / GIB:.2f} GiB and there are {room / GIB:.2f}: "
        "choose a smaller model or a device with more memory"
    )


def _with(config: RunConfig, keys: Mapping[str, object]) -> RunConfig:
    """Return a configuration with other values of keys GROUP.NAME."""
    for key, value in keys.items():
        group, name = key.split(".")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})
    return config


def _settings(*, on_cpu: bool) -> Iterator[tuple[str, dict[str, object]]]:
    for (learner, moments), checkpointing, rows, budget in itertools.product(
        LEARNERS, (False, True), COMPLETIONS, BUDGETS
    ):
        moment = {} if learner == "lora" else {"learner.moments": moments}
        yield (
            learner,
            moment
            | {
                "learner.gradient_checkpointing": checkpointing,
                "learner.token_budget": budget,
                "rollout.max_completions": rows,
            },
        )


def _need(config: RunConfig, estimate: Estimate, *, on_cpu: bool) -> int:
    dtype = resolve_dtype(config.model) if on_cpu else "bfloat16"
    found = estimate(dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype)))
    # copies of weights for decoding are of CPUs, and learners of several GPUs have no engine there
    return (found if on_cpu else dataclasses.replace(found, packed=0)).peak + PROCESS_BYTES
