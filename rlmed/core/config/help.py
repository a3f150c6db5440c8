"""Write what `--help` of a command prints: what it does, its groups and settings, and their values.

Only what the command reads is shown (`rlmed.core.config.rules`).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Mapping
from importlib import resources
from typing import Any

import yaml

from rlmed.core.config.overrides import ADDED_GROUPS, CONFIG_GROUPS, group_options
from rlmed.core.config.rules import MODULES, RECIPES, TRAINING, reads

NOT_KEYS = ("defaults", "hydra")
"""Entries of a YAML file in `conf/` that are no settings."""
WIDTH = 100


def help_text(program: str, purpose: str, values: Mapping[str, Any], *, tries: bool = False) -> str:
    """Return the help of the command of `program`.

    Args:
        program: a key of `MODULES`.
        purpose: what the command does, in some sentences.
        values: the composed configuration.
        tries: whether the command takes `--dry-run`.
    """
    trains, own = program in TRAINING, {key: value for key, value in values.items() if key not in NOT_KEYS}
    groups = {group: used_options(program, group) for group in CONFIG_GROUPS}
    shown = {group: options for group, options in groups.items() if options}
    width = max(map(len, shown))
    lines = [
        textwrap.fill(
            f"  {'+' if group in ADDED_GROUPS else ' '}{group:{width}}  {', '.join(options)}",
            width=WIDTH,
            subsequent_indent=" " * (width + 5),
            break_on_hyphens=False,
        )
        for group, options in shown.items()
    ]
    settings = yaml.safe_dump(_read_only(program, own), sort_keys=False, allow_unicode=True, width=WIDTH - 16)
    tried = (
        "`--dry-run` shows settings, memory, plan and about how long it takes; nothing is written.\n" if tries else ""
    )
    run = "`resume=auto` continues the newest run of this name.\n" if trains else ""
    return (
        f"usage: python -m {MODULES[program]} [+experiment=NAME] [group=option …] [key=value …]\n\n"
        f"{purpose.strip()}\n\n"
        f"groups (group=option):\n\n" + "\n".join(lines) + "\n\n"
        "`model=DIR` and `data=FILE.jsonl` name a model's folder and rows to evaluate on. With +experiment\n"
        "or profile, `--help` shows the values that it sets.\n\n"
        f"settings (key=value, as in {_example(program)}), with the values of this command line:\n\n"
        + textwrap.indent(settings, "  ")
        + f"\n`hydra.run.dir=FOLDER` names the run's folder.\n{run}{tried}"
        "`--multirun` starts a run for each of several values (key=1,2).\n"
        "docs/usage.md explains common settings, and comments in conf/ every one.\n"
    )


def used_options(program: str, group: str) -> list[str]:
    """Return the options of a group that change something in `program`, or are its default.

    Empty if there is no choice.
    """
    options = group_options(group)
    if group in RECIPES:
        return options
    default = _defaults().get(group)
    usual = {} if default is None else _option_values(group, default)
    used = []
    for option in options:
        own = _option_values(group, option)
        changed = {key: value for key, value in own.items() if key not in usual or usual[key] != value}
        if option == default or any(reads(program, key, value) for key, value in changed.items()):
            used.append(option)
    return used if used != [default] else []


def _read_only(program: str, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return the nested values without the keys that `program` never reads."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if not reads(program, f"{where}{key}"):
            continue
        inside = _read_only(program, value, f"{where}{key}.") if isinstance(value, Mapping) else value
        if inside != {} or value == {}:
            kept[key] = inside
    return kept


def _example(program: str) -> str:
    return "learner.lr=1e-5" if program in TRAINING else "eval.max_tokens=256"


def _defaults() -> dict[str, str]:
    """Return the default option of each group that has one."""
    entries = _load("train.yaml")["defaults"]
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def _option_values(group: str, option: str, seen: Collection[str] = ()) -> dict[str, Any]:
    """Return the values that an option sets, by dotted key, with those that it builds on."""
    name = f"{group}/{option}.yaml"
    content, package = _load(name), re.match(r"# @package (\w+)", _text(name))
    values: dict[str, Any] = {}
    for base in content.get("defaults", ()):
        if isinstance(base, str) and base not in ("_self_", *seen):
            values |= _option_values(group, base, (*seen, option))
    return values | _flat(
        {key: value for key, value in content.items() if key not in NOT_KEYS}, f"{package[1] if package else group}."
    )


def _flat(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) and value else {f"{where}{key}": value}
    return flat


def _load(name: str) -> dict[str, Any]:
    content = yaml.safe_load(_text(name))
    return content if isinstance(content, dict) else {}


def _text(name: str) -> str:
    return resources.files("conf").joinpath(name).read_text(encoding="utf-8")
