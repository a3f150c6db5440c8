"""Say which settings would make a run fit into its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from learner.moments import has_eight_bits
from rlmed.cluster.engines import SLOW_BFLOAT16
from rlmed.cluster.memory import GIB
from rlmed.core.config.composing import compose_config
from rlmed.core.config.rules import may_change, reads
from rlmed.core.config.schema import RunConfig
from rlmed.models.cpu.products import bfloat16_speed
from rlmed.models.loading import resolve_device, resolve_dtype

MIN_BUDGET = 1024
"""Smallest `learner.token_budget` that is proposed."""
RANKS = (2, 4, 8)
"""Numbers of `cluster.learner_ranks` that are proposed."""


def _halves(value: int, least: int) -> Iterator[int]:
    while (value := value // 2) >= least:
        yield value


def _moments(config: RunConfig) -> Iterator[str]:
    if config.learner.moments == "float32":
        yield "bfloat16"
    if config.learner.moments != "8bit" and config.cluster.learner_ranks == 1 and has_eight_bits():
        yield "8bit"


def _ranks(config: RunConfig) -> Iterator[int]:
    if config.cluster.kind == "ray" and config.learner.moments != "8bit":
        yield from (ranks for ranks in RANKS if ranks > config.cluster.learner_ranks)


def _dtype(config: RunConfig) -> Iterator[str]:
    slow = resolve_device(config.model).type == "cpu" and bfloat16_speed() < SLOW_BFLOAT16
    if resolve_dtype(config.model) == "float32" and not slow:
        yield "bfloat16"


SPARING: Mapping[str, Callable[[RunConfig], Iterator[Any]]] = {
    "learner.gradient_checkpointing": lambda config: iter(() if config.learner.gradient_checkpointing else (True,)),
    "learner.token_budget": lambda config: _halves(config.learner.token_budget, MIN_BUDGET),
    "rollout.max_completions": lambda config: _halves(config.rollout.max_completions, config.algo.group_size),
    "rollout.prefill_tokens": lambda config: _halves(config.rollout.prefill_tokens, config.data.max_prompt_tokens),
    "learner.moments": _moments,
    "cluster.learner_ranks": _ranks,
    "model.dtype": _dtype,
    "learner.freeze": lambda config: iter(
        () if "vision" in config.learner.freeze else ((*config.learner.freeze, "vision"),)
    ),
    "algo.loss.kl_coef": lambda config: iter((0,) if config.algo.loss.kl_coef else ()),
}
"""Keys and those of their values that take less memory: the least harmful keys first, and the
values that change least.
"""


def sparing_keys(program: str) -> str:
    """Return the keys that spare memory in `program`; last those that only a new run may change."""
    keys = [key for key in SPARING if reads(program, key)]
    always = [key for key in keys if may_change(key)]
    fresh = ", ".join(key for key in keys if key not in always)
    return f"{', '.join(always)}; in a new run also {fresh}" if always else fresh


def advise(config: RunConfig, needed: Callable[[RunConfig], int], available: int) -> str:
    """Return the settings that would fit: one alone, else as few and as little changed as needed.

    Where the weights themselves are trained, also `learner=lora` with what it needs, if that fits.

    Args:
        config: the run; with `resume`, only what a resumed run may change is named.
        needed: returns the bytes that a run needs.
        available: bytes that it has.
    """

    def fits(changed: RunConfig) -> bool:
        return needed(changed) <= available

    def fitting(key: str, start: RunConfig) -> list[Any]:
        return [value for value in SPARING[key](start) if fits(_changed(start, {key: value}))]

    keys = [key for key in SPARING if config.resume is None or may_change(key)]
    alone = [_written(key, values[0]) for key in keys if (values := fitting(key, config))]
    adapters = _adapters(config)
    # adapters leave the rest as it is, and refuse to be told what to freeze
    lora_settings = "learner=lora learner.freeze=[]" if config.learner.freeze else "learner=lora"
    lora = [f"{lora_settings} (needs {needed(run) / GIB:.1f} GiB)" for run in adapters if fits(run)]
    if alone:
        return f"set {' or '.join(alone[:3] + lora)}"
    most = _smallest(config, keys, needed)
    if not fits(_changed(config, most)):
        even = " ".join(_written(*entry) for entry in most.items())
        even = f"even {even} would need {needed(_changed(config, most)) / GIB:.1f}: " if most else ""
        other = f"set {lora[0]}, or " if lora else ""
        return f"{even}{other}use {'' if config.resume else 'a smaller model or '}a device with more memory"
    for key in reversed(keys):  # the most harmful first
        fewer = [other for other in keys if other != key]
        if fits(_changed(config, _smallest(config, fewer, needed))):
            keys = fewer
    chosen = _smallest(config, keys, needed)
    for key in reversed(chosen):
        others = {other: value for other, value in chosen.items() if other != key}
        chosen[key] = fitting(key, _changed(config, others))[0]
    together = " ".join(_written(*entry) for entry in chosen.items())
    return f"set {' or '.join([together, *lora])}"


def _adapters(config: RunConfig) -> list[RunConfig]:
    """Return the run with the adapters of `learner=lora`, unless it has some or is resumed."""
    if config.learner.lora.rank is not None or config.resume is not None:
        return []
    lora = compose_config("train", ["learner=lora"]).learner.lora
    return [_changed(config, {"learner.lora": lora, "learner.freeze": ()})]


def _smallest(config: RunConfig, keys: Sequence[str], needed: Callable[[RunConfig], int]) -> dict[str, Any]:
    """Return the values of these keys with which the run takes the least memory."""
    chosen: dict[str, Any] = {}
    for key in keys:
        before = _changed(config, chosen)
        runs = [(needed(_changed(before, {key: value})), value) for value in SPARING[key](before)]
        bytes_, value = min(runs, key=lambda run: run[0], default=(needed(before), None))
        if bytes_ < needed(before):
            chosen[key] = value
    return chosen


def _changed(config: Any, settings: Mapping[str, Any]) -> Any:
    """Return a configuration, or a section of one, with other values of these keys."""
    for key, value in settings.items():
        name, _, rest = key.partition(".")
        config = dataclasses.replace(config, **{name: _changed(vars(config)[name], {rest: value}) if rest else value})
    return config


def _written(key: str, value: Any) -> str:
    """Return a setting as on the command line."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{key}=[{','.join(value)}]" if isinstance(value, tuple) else f"{key}={text}"
