"""Build a valid configuration from mappings; report unknown keys, wrong types, missing values."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

from rlmed.core.config.checks import ConfigError
from rlmed.core.config.schema import RunConfig
from rlmed.core.spelling import closest

T = TypeVar("T")


def build_config(mapping: Mapping[str, Any]) -> RunConfig:
    """Validate a composed configuration.

    Args:
        mapping: plain nested mappings, lists and scalars.

    Raises:
        ConfigError: for an unknown or missing key, a value of the wrong type, or an impossible
            value.
    """
    _check_values(mapping, "")
    return _build(RunConfig, mapping, "")


def build_record(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Rebuild a dataclass, and nested ones, from `dataclasses.asdict` after a JSON round trip.

    Raises:
        ConfigError: as `build_config`.
    """
    return _build(cls, mapping, "")


def _check_values(value: Any, where: str) -> None:
    """Raise ConfigError for empty strings, NaN and infinities: right in type, but unusable."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_values(entry, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            _check_values(entry, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}={value} is not finite: give a finite number")
    elif value == "":
        raise ConfigError(f"{where}='' is empty: give a value, or leave it out")


RENAMED = {
    **{
        f"algo.{name}": f"algo.loss.{name}"
        for name in (
            *("ratio_level", "clip", "clip_ratio_low", "clip_ratio_high", "dual_clip", "kl_coef", "kl_estimator"),
            *("aggregation", "old_logprobs", "importance_cap", "mask_truncated"),
        )
    },
    "before": "compare_to",
    "cluster.worker_gpus": "cluster.gpus_per_worker",
    "cluster.learner_gpus": "cluster.gpus_per_rank",
    "data.selection.min_visits": "data.selection.window",
    "data.selection.low": "data.selection.min_pass_rate",
    "data.selection.high": "data.selection.max_pass_rate",
    "data.selection.retest_after": "data.selection.cooldown_epochs",
    "reward.weights.agreement": "reward.weights.reasoning_consistency",
}
"""Keys of rlmed 0.1, and their names now."""
REMOVED = {
    "eval.trust": "python -m rlmed.reliability measures it",
    "eval.samples": "set reliability.samples of python -m rlmed.reliability",
}
"""Keys of rlmed 0.1 that a command has replaced."""


def check_key(key: str) -> None:
    """Check that a key exists, before a value is set.

    Args:
        key: dotted key, for example "learner.lr"; a section such as "learner" is valid too.

    Raises:
        ConfigError: for an unknown key; suggests the closest one.
    """
    hint: Any = RunConfig
    where = ""
    for part in key.split("."):
        if not dataclasses.is_dataclass(hint):
            return  # a mapping such as reward.weights takes any key
        hints = typing.get_type_hints(hint)
        if part not in hints:
            raise _unknown_key(part, hints, where)
        hint, where = hints[part], f"{where}{part}."


def _unknown_key(key: str, hints: Mapping[str, Any], where: str) -> ConfigError:
    """Return the error for a key that a section's fields lack; suggest keys in it or one below."""
    if f"{where}{key}" in RENAMED:
        return ConfigError(f"unknown key {where}{key}: renamed to {RENAMED[f'{where}{key}']}")
    if f"{where}{key}" in REMOVED:
        return ConfigError(f"unknown key {where}{key}: {REMOVED[f'{where}{key}']}")
    keys = {name: [f"{where}{name}"] for name in hints}
    for section, of in hints.items():
        for name in typing.get_type_hints(of) if dataclasses.is_dataclass(of) else ():
            keys.setdefault(name, []).append(f"{where}{section}.{name}")
    near = closest(key, keys)
    hint = f"did you mean {' or '.join(keys[near])}?" if near else f"known keys: {', '.join(sorted(hints))}"
    return ConfigError(f"unknown key {where}{key}: {hint}")


def _build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(mapping, Mapping):
        known = ", ".join(sorted(fields))
        raise ConfigError(f"{where.rstrip('.')}={mapping!r} must be a mapping with the keys {known}")
    hints = typing.get_type_hints(cls)
    for key in mapping:
        if key not in fields:
            raise _unknown_key(str(key), hints, where)
    values: dict[str, Any] = {}
    for name, entry in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], f"{where}{name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} is missing: set it on the command line or in a file under conf/")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str, *, optional: bool = False) -> Any:
    """Convert a plain value to the annotated type; accept an integer as float, guess nothing."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, f"{where}.")
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (of,) = (arg for arg in args if arg is not type(None))
        return _convert(of, value, where, optional=True)
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
        if len(value) == len(args):
            return tuple(
                _convert(arg, entry, f"{where}[{i}]") for i, (arg, entry) in enumerate(zip(args, value, strict=True))
            )
    elif origin is tuple and isinstance(value, str) and args[-1] is Ellipsis:
        return (_convert(args[0], value, where),)
    elif origin is not None and isinstance(value, Mapping):
        return {str(key): _convert(args[1], entry, f"{where}.{key}") for key, entry in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif origin is None and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}={value!r} has {len(value)} entries: expected {len(args)}")
    if hint is str and isinstance(value, bool):
        raise ConfigError(
            f"{where}={value!r} must be a string: YAML reads on, off, yes and no as booleans, so quote them"
        )
    raise ConfigError(f"{where}={value!r} has the wrong type: expected {_type_name(hint, optional=optional)}")


def _type_name(hint: Any, *, optional: bool) -> str:
    if optional:
        either = _type_name(hint, optional=False)
        return f"{either.replace(' or ', ', ')} or null"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    if get_origin(hint) is tuple:
        return "a list"
    if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping):
        return "a mapping such as {KEY: VALUE}"
    return names.get(hint, str(hint))
