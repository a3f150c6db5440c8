"""Generated pages: keys from schema and conf/, metrics from their table, APIs from docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import hydra
from omegaconf import OmegaConf

from rewards.rubric import GROUP_REWARDS, LIKELIHOOD_REWARDS, REWARDS
from rlmed.core.config import running, schema
from rlmed.core.config.schema import RunConfig
from rlmed.core.config.use import plain_values
from rlmed.core.metrics import METRICS

CONF = Path(__file__).resolve().parent.parent / "conf"
LONGEST_DEFAULT = 60
SETTING = re.compile(
    r"(?<![\w./\[])(?:python -m rlmed\.\w+(?: \+?[a-z_.]+=[\w./-]*\w)*|\+?[a-z][a-z_.]*[a-z](?:=[\w.:\[\]/-]*\w\]?|_\w+))"
)
"""A command, `key=value`, or a name with an underscore."""
GUIDE = """\
# Configuration keys

Set a key on the command line: `python -m rlmed.launch algo.group_size=8`. Choose a group's option: `algo=dapo`. Defaults
are those of `python -m rlmed.launch` without arguments; a group's other options change some of them. A command refuses
keys that it does not read. [Usage](../usage.md#settings) explains the rest.

This page is generated from the schema and the comments in [`conf/`](../../conf).
"""
METRICS_GUIDE = """\
# Metrics

One line of `metrics.jsonl` per step, also in TensorBoard. In a name, `*` stands for a reward, modality, stage or file.
*Over* says how one number comes from a step's many: a mean, maximum or sum over the step and all ranks; `total` counts
from the start of the run; `latest` is the value after the step. Shares are between 0 and 1. A missing number is `null`.
"""
OUR_REWARDS = sorted({reward.__module__ for reward in (REWARDS | GROUP_REWARDS | LIKELIHOOD_REWARDS).values()})
APIS = {
    "rewards": (
        "Rewards",
        "[Your own](../tutorial.md#3-a-reward-of-your-own) is a function; these are ours.",
        [
            "rewards.base",
            "rewards.rubric",
            "rewards.slow",
            "rewards.judge",
            "rewards.embedding",
            "rewards.radeval",
            "rlmed.core.parsing",
            *OUR_REWARDS,
        ],
    ),
    "core": (
        "Records and protocols",
        "What flows through the loop, and what the loop drives.",
        ["rlmed.core.types", "rlmed.core.protocols"],
    ),
    "readers": (
        "Readers",
        "How a data set becomes rows.",
        ["rlmed.data.readers.base", "rlmed.data.readers.registry"],
    ),
    "loop": (
        "Loop",
        "The training loop and the buffer it takes batches from.",
        ["rlmed.controller", "rollout.buffer"],
    ),
    "learner": (
        "Learner",
        "The mathematics of the update.",
        ["learner.advantages", "learner.losses", "learner.kl", "learner.metrics", "learner.learner"],
    ),
}
"""Title, first line and modules of each page."""


def pages() -> dict[str, str]:
    """Return the markdown of each page by its name."""
    apis = {
        name: f"# {title}\n\n{line}\n\n" + "\n\n".join(f"::: {module}" for module in modules)
        for name, (title, line, modules) in APIS.items()
    }
    return {"configuration": configuration(), "metrics": metrics(), **apis}


def metrics() -> str:
    """Return the table of metrics."""
    rows = [f"| `{name}` | {m.reduction} | {m.unit} | {_prose(m.meaning)} |" for name, m in METRICS.items()]
    return "\n".join([METRICS_GUIDE, "| name | over | unit | meaning |", "| --- | --- | --- | --- |", *rows, ""])


def configuration() -> str:
    """Return a list per group of files that sets keys of several sections, a table per section."""
    defaults, choices = _defaults(), _choices()
    sections: dict[str, list[str]] = {}
    for key, hint in _hints(RunConfig):
        kind = _kind(hint, choices.get(key))
        rows = sections.setdefault(key.rpartition(".")[0] and key.partition(".")[0], [])
        for name, text in explained(key).items():
            entry = name.removeprefix(f"{key}.")
            value, shown_kind = (defaults[key], kind) if name == key else (defaults[key].get(entry, 0.0), "number")
            rows.append(f"| `{name}`{{ #{name} }} | {shown_kind} | {_shown(value)} | {_prose(text)} |")
    parts = [GUIDE]
    groups = {path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    for group in sorted(groups - set(sections)):
        parts += [f"## `{group}=`\n", *_options(group)]
    for section, rows in sections.items():
        parts += [f"## {section or 'Run'}\n", *_options(section), _table(rows)]
    return "\n".join(parts)


def _table(rows: list[str]) -> str:
    return "\n".join(["| key | type or choices | default | |", "| --- | --- | --- | --- |", *rows, ""])


def _options(group: str) -> Iterator[str]:
    """Yield a list of a group's files, with first comments; nothing for one without a folder."""
    files = sorted((CONF / group).glob("[!_]*.yaml")) if group else []
    for path in files:
        sign = "+" if group in ("experiment", "debug") else ""
        yield f"- `{sign}{group}={path.stem}`: {_prose(_head(path))}"
    if files:
        yield ""


def _head(path: Path) -> str:
    """Return the comment at the head of a file; a blank line or a key ends it."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    return _joined(_leading_comments(lines))


def _leading_comments(lines: list[str]) -> list[str]:
    count = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:count]


def explained(key: str) -> dict[str, str]:
    """Return the comment above a key by its name, or, of a mapping, those above its entries.

    Raises:
        ValueError: for a key without a comment.
    """
    section, _, rest = key.partition(".")
    comments = dict(_comments(CONF / "train.yaml"))
    for path in sorted((CONF / section).glob("*.yaml")) if rest else []:
        comments = {f"{section}.{name}": text for name, text in _comments(path).items()} | comments
    if key in comments:
        return {key: comments[key]}
    entries = {name: text for name, text in comments.items() if name.startswith(f"{key}.")}
    if not entries:
        raise ValueError(f"{key} has no comment in conf/")
    return entries


def _comments(path: Path) -> dict[str, str]:
    """Return the comment directly above each key of a YAML file, by dotted key."""
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    above: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        bare = line.strip()
        if bare.startswith("#"):
            above.append(bare)
            continue
        if match := re.match(r"( *)([A-Za-z_]+):", line):
            depth = len(match[1])
            parents = [(at, name) for at, name in parents if at < depth] + [(depth, match[2])]
            if above:
                found[".".join(name for _, name in parents)] = _joined(above)
        above = []
    return found


def _joined(comments: list[str]) -> str:
    return " ".join(line.strip().removeprefix("#").strip() for line in comments)


def _hints(cls: type[Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key with its annotation, in schema order: keys of the run itself first."""
    hints = typing.get_type_hints(cls)
    for name in sorted(hints, key=lambda name: dataclasses.is_dataclass(hints[name])):
        if dataclasses.is_dataclass(hints[name]):
            yield from _hints(hints[name], f"{where}{name}.")
        else:
            yield f"{where}{name}", hints[name]


def _choices() -> dict[str, tuple[str, ...]]:
    """Return the choices of keys that have some: what the checks of the schema accept."""
    found: dict[str, tuple[str, ...]] = {}
    for module in (schema, running):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require_one_of":
                key, _, allowed = node.args
                values = vars(module)[allowed.id] if isinstance(allowed, ast.Name) else ast.literal_eval(allowed)
                found[ast.literal_eval(key)] = tuple(values)
    return found


def _kind(hint: Any, choices: tuple[str, ...] | None) -> str:
    if choices is None:
        return _type_name(hint)
    return "list of " * ("tuple" in str(hint)) + ", ".join(f"`{name}`" for name in choices)


def _type_name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _type_name(arg) for arg in args)
    if origin is tuple:
        return f"list of {_type_name(args[0])}s"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{{name: {_type_name(args[1])}}}" if args else "mapping"
    return {int: "integer", float: "number", bool: "boolean", str: "string"}.get(hint, "any")


def _defaults() -> dict[str, Any]:
    """Return the value of each key without overrides."""
    with hydra.initialize_config_module("conf", version_base="1.3"):
        composed = hydra.compose("train", overrides=[])
    return plain_values(typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True)))


def _shown(value: Any) -> str:
    """Return a value as YAML would, short enough for a cell."""
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{name}: {entry}" for name, entry in value.items()) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(map(str, value)) + "]"
    elif isinstance(value, str):
        text = value
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    first = text.splitlines()[0] if text else ""
    short = first if first == text and len(text) <= LONGEST_DEFAULT else f"{first[:LONGEST_DEFAULT]}…"
    return f"`{short}`"


def _prose(text: str) -> str:
    """Make a comment safe in a table, and its keys and settings code."""
    parts = text.split("`")
    for at in range(0, len(parts), 2):
        plain = parts[at].replace("<", "&lt;").replace("|", "\\|")
        parts[at] = SETTING.sub(r"`\g<0>`", plain)
    return "`".join(parts)
