"""Reject overrides that a command would not read.

A key of the schema is read by a command unless a rule in `rlmed.core.config.rules` says otherwise;
a test compares the rules with the keys that a run of each command really reads. Only command-line
overrides are checked: experiments are shared by commands and cases. A key that a command never
reads is rejected whatever its value; a key left unread because of another key's value, or a group's
option, is rejected only if it changes something.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlmed.core.config.checks import ConfigError
from rlmed.core.config.rules import MODULES, RECIPES, RULES, Rule
from rlmed.core.config.schema import RunConfig

Compose = Callable[[Sequence[str]], Mapping[str, Any]]
"""Compose overrides with Hydra into a plain nested mapping."""


@dataclass(frozen=True)
class Refusal:
    """An override without effect in a command.

    Example:
        Refusal("steps=9", "steps=9: rlmed.sft does not read steps. Set sft.epochs")
    """

    override: str
    text: str


def check_used(program: str, overrides: Sequence[str], groups: Collection[str], compose: Compose) -> None:
    """Check that every override has an effect in `program`; arguments as in `find_unused`.

    Raises:
        ConfigError: naming override, key and command, and what to do.
    """
    refusals = find_unused(program, overrides, groups, compose)
    if refusals:
        raise ConfigError("; ".join(refusal.text for refusal in refusals))


def find_unused(program: str, overrides: Sequence[str], groups: Collection[str], compose: Compose) -> list[Refusal]:
    """Return the overrides without effect in a command.

    Args:
        program: a key of `MODULES`.
        overrides: Hydra overrides, without those of `hydra` itself.
        groups: names of the config groups, whose overrides choose an option.
        compose: composes overrides for `program`.
    """
    recipe = [entry for entry in overrides if _key(entry) in RECIPES]
    chosen = [entry for entry in overrides if _key(entry) in groups and entry not in recipe]

    @functools.cache
    def values(*entries: str) -> dict[str, Any]:
        return plain_values(compose(entries))

    start, options, full = values(*recipe), values(*recipe, *chosen), values(*overrides)
    refusals = []
    for entry in overrides:
        if entry in recipe:
            continue
        own = f"{_key(entry)}."
        if entry in chosen:
            before, after, named = start, values(*recipe, entry), []
        else:
            before, after, named = options, full, [key for key in full if own.startswith(f"{key}.")]
        changed = [key for key in after if after[key] != before.get(key)]
        keys = named + [key for key in changed if entry in chosen or (key not in named and f"{key}.".startswith(own))]
        # what an option brings may be read by way of another override
        rules = [(key, rule_of(program, key, full) and rule_of(program, key, after)) for key in keys]
        refused = [(key, rule) for key, rule in rules if rule and (key in changed or not rule.conditional)]
        # an option is a set, of which some may be for other cases
        if refused and (entry not in chosen or len(refused) == len(keys)):
            refusals.append(Refusal(entry, _text(entry, MODULES[program], refused, after)))
    return refusals


def rule_of(program: str, key: str, values: Mapping[str, Any]) -> Rule | None:
    """Return the rule that leaves `key` unread in `program` given all keys' values, else None."""
    return next(
        (
            rule
            for rule in RULES
            if program in rule.programs and rule.covers(key, values.get(key)) and rule.applies(values)
        ),
        None,
    )


def schema_keys(cls: type[Any] = RunConfig, where: str = "") -> Iterator[str]:
    """Yield all keys, dotted; a mapping such as reward.weights is one key."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from schema_keys(typing.cast(type[Any], hint), f"{where}{name}.")
        else:
            yield f"{where}{name}"


def plain_values(composed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the composed value of each key of the schema, tuples as lists."""
    values = {}
    for key in schema_keys():
        *sections, name = key.split(".")
        part: Any = composed
        for section in sections:
            part = part.get(section) if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and name in part:
            values[key] = list(part[name]) if isinstance(part[name], tuple) else part[name]
    return values


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _text(override: str, module: str, refused: Sequence[tuple[str, Rule]], values: Mapping[str, Any]) -> str:
    names = [f"{key}={_shown(values[key])}" if rule.values else key for key, rule in refused]
    rule = refused[0][1]
    met = [f"{name}={_shown(values[name])}" for name in (*rule.when, *rule.unless)]
    condition = f" while {' and '.join(met)}" if met else ""
    return f"{override}: {module} does not read {', '.join(names)}{condition}. {rule.advice}"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
