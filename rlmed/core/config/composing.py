"""Compose configurations outside commands, write them as YAML, compare them with earlier runs'."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlmed.core.config.building import REMOVED, RENAMED, build_config
from rlmed.core.config.checks import ConfigError
from rlmed.core.config.overrides import CONFIG_GROUPS, explain
from rlmed.core.config.rules import may_change
from rlmed.core.config.schema import RunConfig
from rlmed.core.config.use import Refusal, find_unused

log = logging.getLogger(__name__)


def compose_config(program: str, overrides: Sequence[str]) -> RunConfig:
    """Compose the configuration that `python -m rlmed.<program>` would use with these overrides.

    Args:
        program: a key of `rules.MODULES`.
        overrides: as on the command line, without shorthands.

    Raises:
        ConfigError: for an unknown key or invalid value.
    """
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return build_config(plain_config(hydra.compose(program, overrides=list(overrides))))


def plain_config(composed: DictConfig) -> dict[str, Any]:
    """Return Hydra's configuration as a mapping; ConfigError if an experiment lacks `@package`."""
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    if "experiment" in plain:
        raise ConfigError(
            "the file of +experiment=NAME must begin with the line `# @package _global_` and contain keys with values"
        )
    return {str(key): value for key, value in plain.items()}


def unused_overrides(program: str, overrides: Sequence[str]) -> list[Refusal]:
    """Return overrides that `python -m rlmed.<program>` would reject because it doesn't read them.

    Raises:
        ConfigError: if Hydra cannot compose the overrides.
    """
    with hydra.initialize_config_module("conf", version_base="1.3"):
        try:
            return find_unused(
                program, overrides, CONFIG_GROUPS, lambda entries: plain_config(hydra.compose(program, list(entries)))
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error)) from error


def to_yaml(config: RunConfig) -> str:
    """Return the validated configuration as YAML, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.create(to_mapping(config)))


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """Return the validated configuration as nested mappings and lists."""
    plain = _plain(dataclasses.asdict(config))
    assert isinstance(plain, dict)
    return plain


ADDED = {
    "learner.moments": "float32",
    "data.extra_tasks": [],
    "data.synonyms": None,
    "data.box_frame": "auto",
    "reward.iou.kind": "mean",
    **{
        f"learner.lora.{name}": value
        for name, value in {
            "rank": None, "alpha": 32.0, "target": ["language_model"], "dropout": 0.0, "quantize": None
        }.items()
    },
}  # fmt: skip
"""Keys that runs of earlier versions do not have, with the value that describes them."""


LENGTHS = ("steps", "sft.epochs")
"""Keys that may grow when a run resumes."""


def check_same_run(saved: Path, config: RunConfig, *, unused: Collection[str]) -> None:
    """Check that a run resumes with the settings it was started with.

    Args:
        saved: the run's `config.yaml`.
        config: the configuration to resume with.
        unused: further keys that this kind of run ignores.

    A run may go on for longer than it was to last, whose learning rate then follows the new length.

    Raises:
        ValueError: for settings that differ; names each key with both values.
    """
    content = OmegaConf.to_container(OmegaConf.load(saved))
    assert isinstance(content, dict)
    before = ADDED | {RENAMED.get(key, key): value for key, value in _flat(content).items() if key not in REMOVED}
    after = _flat(_plain(dataclasses.asdict(config)))
    if "by_task" not in content.get("prompt", {}):  # of an earlier version, which knew one task
        after = {key: value for key, value in after.items() if not key.startswith("prompt.by_task.")}
    slow = ("judge", "embedding", "radeval")  # their settings have no effect without a weight
    without = tuple(f"reward.{name}." for name in slow if name not in config.reward.weights)
    if config.reward.iou.kind == "mean":  # its other keys have no effect
        without += ("reward.iou.start", "reward.iou.end", "reward.iou.steps")
    ignored = {key for key in after | before if may_change(key) or {key, key.split(".")[0]} & {*unused}}
    for key in sorted({*LENGTHS} - ignored):
        _check_length(saved.parent, key, before[key], after[key])
        if after[key] > before[key] and config.learner.lr_schedule != "constant":
            log.warning(
                "%s=%g instead of %g: learner.lr_schedule=%s now ends there, so the learning rate is another from here on",
                key,
                after[key],
                before[key],
                config.learner.lr_schedule,
            )
    different = [
        f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
        for key in after | before  # a mapping, such as data.mix, may have had other entries then
        if not (key in ignored or key in LENGTHS or key.startswith(without)) and before.get(key) != after.get(key)
    ]
    if different:
        raise ValueError(
            f"the run in {saved.parent} was started with other settings ({'; '.join(different)}): "
            "use the same settings to resume it, or resume=null for a new run"
        )


def _check_length(folder: Path, key: str, then: float, now: float) -> None:
    if now < then:
        raise ValueError(
            f"the run in {folder} was started with {key}={then:g}, and {key}={now:g} would end it earlier: resume it with "
            f"{key}={then:g} or more (Ctrl-C ends it at any step, and its checkpoints stay), or use resume=null for a new run"
        )


def differences(config: RunConfig, base: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return by dotted key what differs between two configurations, as (`config`'s, `base`'s)."""
    own, other = _flat(to_mapping(config)), _flat(to_mapping(base))
    return {key: (own.get(key), other.get(key)) for key in own | other if own.get(key) != other.get(key)}


def _plain(value: Any) -> Any:
    """Convert tuples to lists, as YAML reads them back."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _flat(value: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flat(entry, f"{prefix}{key}.") if isinstance(entry, Mapping) else {f"{prefix}{key}": entry}
    return flat
