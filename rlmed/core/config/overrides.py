"""Translate command-line arguments to Hydra overrides: expand shorthands and quote file names.

| written | means |
| --- | --- |
| `+experiment=X` without a CUDA device | `+experiment=X profile=tiny`, if rlmed ships X (`profile=paper` overrides it) |
| `profile=X` without an experiment | `+profile=X` |
| neither profile nor experiment, to train the embedded model | `+profile=tiny` |
| `experiment=X`, `debug=X` | `+experiment=X`, `+debug=X` |
| `model=DIR` | `model.path=DIR` |
| `data=a.jsonl` | `data=jsonl data.eval=[a.jsonl]` |
| `resume=auto` | resume in `hydra.run.dir` if set, else the newest run of that name that saved something, else start anew |
| `resume=RUN_FOLDER` | resume in that folder |

A value that Hydra's grammar rejects (`data.train=测试.jsonl`, `data.eval=[fold=2.jsonl]`), or would
read as something other than the string that its key expects (`name=2024`), is quoted. Values
already in quotes are left to Hydra.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from rlmed.core.config.building import check_key
from rlmed.core.config.schema import RunConfig
from rlmed.core.files.litter import is_litter
from rlmed.core.files.other_formats import to_prepare
from rlmed.core.process.display import one_line
from rlmed.core.spelling import closest

CONFIG_GROUPS = tuple(sorted(entry.name for entry in resources.files("conf").iterdir() if entry.is_dir()))
OLD_SUFFIX = "_embedded"
OLD_PROFILES = {"embedded": "renamed to profile=tiny", "auto": "this is the default, leave it out"}
"""Names of rlmed 0.1: profiles, and what its small experiments ended in."""
ADDED_GROUPS = ("experiment", "debug")
"""Groups without a default option."""
TINY_MODELS = {"tiny", "embedded:tiny_base"}
"""Names of the embedded model: the option of `conf/model/`, and its path there."""
OWN_CONFIGURATION = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "hydra.searchpath")
ROWS_ENDING = ".jsonl"
_HYDRA_TEXTS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name")


def group_options(group: str) -> list[str]:
    """Return the option names in `conf/<group>/`, without files that options share (`_*.yaml`)."""
    folder = resources.files("conf").joinpath(group)
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return sorted(name.removesuffix(".yaml") for name in names if not name.startswith("_") and not is_litter(name))


def expand(arguments: Sequence[str], *, cuda: bool, sweeps: bool = False, trains: bool = False) -> list[str]:
    """Expand the shorthands of the module docstring and quote values.

    Args:
        arguments: the command line after the program's name; flags (leading dash) are kept
            unchanged.
        cuda: whether a CUDA device is available.
        sweeps: commas separate several values, as with `--multirun`.
        trains: whether the program does, in whose settings the embedded model wants its profile.

    Raises:
        ValueError: for an unknown key, the old name of an option, a resume folder without a
            checkpoint, or a shorthand together with the key it stands for.
    """
    entries = [_without_spaces(entry) for entry in arguments]
    for entry in entries:
        key, equals, _ = entry.partition("=")
        # +key and ~key change the composition itself, and so does group@package; hydra.key is
        # Hydra's own
        known = key in ADDED_GROUPS or "@" in key or re.split(r"[./]", key)[0] == "hydra"
        if equals and not key:
            raise ValueError(f"{entry}: the key before = is missing")
        if equals and key[:1].isalpha() and not known:
            check_key(key)
    _check_old_options(entries)
    entries = _with_profile(entries, cuda=cuda, trains=trains)
    sweeps = sweeps or "--multirun" in entries
    expanded = [(entry, new) for entry in entries for new in _expand_one(entry)]
    _check_shorthands(expanded)
    return [new if new.startswith("-") else in_hydras_grammar(new, sweeps=sweeps) for _, new in expanded]


def _check_old_options(entries: Sequence[str]) -> None:
    """Raise ValueError for a profile, or an experiment of a profile, by its name in rlmed 0.1."""
    for entry in entries:
        key, _, value = entry.partition("=")
        if key.lstrip("+") == "experiment":
            names = [name.removesuffix(OLD_SUFFIX) for name in _names(value)]
            if names != _names(value) and set(names) <= set(group_options("experiment")):
                raise ValueError(f"{entry}: renamed to +experiment={','.join(names)} profile=tiny")
        if key.lstrip("+") == "profile" and value in OLD_PROFILES:
            raise ValueError(f"{entry}: {OLD_PROFILES[value]}")


def _with_profile(entries: Sequence[str], *, cuda: bool, trains: bool) -> list[str]:
    """Add the profile that a shipped experiment has on this machine, unless one is given.

    Without an experiment, add the embedded model's: at other settings' learning rate, the paper's,
    it would learn nothing.
    """
    experiments, profiles = _chosen(entries, "experiment"), _chosen(entries, "profile")
    if profiles and not experiments:  # then there is none to override
        return [f"+{entry}" if entry.startswith("profile=") else entry for entry in entries]
    if trains and not profiles and not experiments and _trains_tiny(entries):
        return [*entries, "+profile=tiny"]
    if profiles or cuda or set(experiments).isdisjoint(group_options("experiment")):
        return list(entries)
    return [*entries, "profile=tiny"]


def _trains_tiny(entries: Sequence[str]) -> bool:
    """Return whether the model is the embedded one: by name, or by default.

    Configuration of one's own may name another one.
    """
    pairs = [entry.partition("=") for entry in entries]
    models = {value for key, _, value in pairs if key.lstrip("+") in ("model", "model.path")}
    return models <= TINY_MODELS and not any(key in OWN_CONFIGURATION for key, _, _ in pairs)


def _chosen(entries: Sequence[str], group: str) -> list[str]:
    """Return the names of the options given for a group, several for `--multirun`."""
    pairs = (entry.partition("=") for entry in entries)
    return [name for key, _, value in pairs if key.lstrip("+") == group for name in _names(value)]


def _check_shorthands(expanded: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError if a shorthand and another argument set the same key.

    `expanded` pairs what is written with what is meant.
    """
    for written, meant in expanded:
        key = meant.partition("=")[0]
        others = [other for other, also in expanded if other != written and also.partition("=")[0] == key]
        if others and key.lstrip("+") != written.partition("=")[0].lstrip("+"):
            raise ValueError(f"{written} and {others[0]} both set {key}: drop one of them")


def _names(value: str) -> list[str]:
    """Split a value into names: one, or several for `--multirun`."""
    return [name.strip().strip("'\"") for name in value.split(",")]


def _without_spaces(argument: str) -> str:
    """Return `steps = 5`, quoted for the shell, as `steps=5`."""
    key, equals, value = argument.partition("=")
    return argument if key.startswith("-") else f"{key.strip()}{equals}{value}"


def _expand_one(argument: str) -> list[str]:
    key, equals, value = argument.partition("=")
    if not equals:
        return [argument]
    if value.startswith("~/"):  # which shells leave as it is behind =
        value = os.path.expanduser(value)
        argument = f"{key}={value}"
    plain = key.lstrip("+")
    if plain in CONFIG_GROUPS and plain != "model" and (value == "null" or _names_options(plain, value)):
        raise ValueError(
            f"{argument}: a run takes exactly one {plain}: choose one of {', '.join(group_options(plain))}"
        )
    if plain in ADDED_GROUPS:
        names = _names(value)
        if plain == "debug" and not set(names) <= set(group_options(plain)):
            return [argument]
        return [f"+{plain}={','.join(names)}"]
    # of these there is one already, and + would be a second
    if key.startswith("+") and _kind(plain) == "group":
        return _expand_one(f"{plain}={value}")
    if key == "model" and value not in group_options("model"):
        return [f"model.path={quoted(value)}"]
    if key == "data" and value.endswith((ROWS_ENDING, f"{ROWS_ENDING}'", f'{ROWS_ENDING}"', "]")):
        return ["data=jsonl", f"data.eval={value if value.startswith('[') else f'[{_files(value)}]'}"]
    if key == "data" and value not in group_options("data") and (other := to_prepare(Path(_unquoted(value)))):
        raise ValueError(f"data={value}: {other}")
    if key == "data" and re.match(r"[^{$]*[./\\]", value):
        raise ValueError(
            f"data={value}: questions are read from JSON Lines files ({ROWS_ENDING}); `python -m rlmed.prepare` makes them "
            "from tables and published data (docs/data.md)"
        )
    if key == "resume" and value not in ("auto", "null", ""):
        folder = Path(_unquoted(value))
        if not (folder / "checkpoints").is_dir():
            missing = "no checkpoints in that folder" if folder.is_dir() else "no such folder"
            inner = sorted(path.parent for path in folder.glob("*/checkpoints"))
            near = f" (did you mean resume={inner[-1]}?)" if inner else ""
            raise ValueError(f"resume={value}: {missing}; give a run folder with a checkpoint{near}, or resume=auto")
        return [f"resume={quoted(value)}", f"hydra.run.dir={quoted(value)}"]
    return [argument]


def _names_options(group: str, value: str) -> bool:
    """Return True if a value is a list of options: Hydra would merge them over each other."""
    entries = _entries(value)
    return entries is not None and {entry.strip("'\"") for entry in entries} <= {*group_options(group)}


def _files(value: str) -> str:
    """Quote files, separated by commas; a comma not before another file belongs to the name."""
    parts = value.split(",")
    several = all(part.strip().endswith(ROWS_ENDING) for part in parts)
    return ",".join(map(quoted, parts)) if several else quoted(value, commas=False)


def quoted(path: str, *, commas: bool = True) -> str:
    """Quote a string for Hydra's grammar where it could be read as something else.

    Args:
        path: the string; an already quoted one is returned unchanged.
        commas: leave commas unquoted: with `--multirun` they separate several paths.
    """
    plain = re.fullmatch(r"[A-Za-z_./][\w./:+,-]*" if commas else r"[A-Za-z_./][\w./:+-]*", path, re.ASCII)
    if (plain and path.lower() not in ("null", "true", "false", "inf", "nan")) or _is_quoted(path):
        return path
    # backslashes are literal except before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (r"\'" if found[2] else ""), path) + "'"


def _is_quoted(text: str) -> bool:
    parsed = _parse(f"key={text}")
    return text[:1] in ("'", '"') and parsed is not None and not parsed.is_sweep_override()


def _unquoted(text: str) -> str:
    parsed = _parse(f"key={text}") if _is_quoted(text) else None
    return text if parsed is None else str(parsed.value())


def _parse(override: str) -> Override | None:
    """Parse an override with Hydra; None if its grammar, or a function in the value, rejects it."""
    try:
        parsed = OverridesParser.create().parse_override(override)
        if not parsed.is_sweep_override():
            parsed.value()
    except HydraException:
        return None
    return parsed


def in_hydras_grammar(override: str, *, sweeps: bool) -> str:
    """Quote an override's value where Hydra would reject or misread it.

    Args:
        override: as written, shorthands expanded.
        sweeps: with `--multirun`, where commas separate several values.
    """
    key, equals, value = override.partition("=")
    if not equals or _parse(f"{key}=1") is None:  # `explain` reports an invalid key
        return override
    kind = _kind(key.lstrip("+~"))
    if _stays(value, kind, sweeps=sweeps):
        return override
    entries = _entries(value)
    if kind != "text" and entries is not None:
        new = f"{key}=[{','.join(entry if _stays(entry, kind) else quoted(entry, commas=False) for entry in entries)}]"
    elif kind == "texts" and _are_several(key, value):
        new = in_hydras_grammar(f"{key}=[{value}]", sweeps=False)
    elif kind != "text" and value.lstrip().startswith("{"):
        return override  # as a string it would have the wrong type
    else:
        new = f"{key}={quoted(value, commas=False)}"
    return override if _parse(new) is None else new


def _stays(value: str, kind: str, *, sweeps: bool | None = None) -> bool:
    """Return whether Hydra reads the value as meant; `sweeps` is None in a list, without sweeps."""
    parsed = _parse(f"key={value}")
    if parsed is None:
        return False
    if parsed.is_sweep_override():
        return sweeps is True or (
            sweeps is False and kind != "text" and kind != "texts"
        )  # `explain` says what a sweep needs
    meant = parsed.value()
    if kind == "other" or meant is None:
        return True
    if kind == "group":
        return not isinstance(meant, int | float)
    # two backslashes are one to Hydra, and two in a path
    return isinstance(meant, str) and not ("\\\\" in value and meant == value.replace("\\\\", "\\"))


def _are_several(key: str, value: str) -> bool:
    """Return True if commas separate the entries of a list written without brackets."""
    parts = value.split(",")
    return len(parts) > 1 and (key != "data.eval" or all(part.strip().endswith(ROWS_ENDING) for part in parts))


def _entries(value: str) -> list[str] | None:
    """Return the entries of a list as written; None for anything else."""
    inside = value.strip()
    if not (inside.startswith("[") and inside.endswith("]")):
        return None
    entries, start, depth, quote = [], 0, 0, ""
    inside = inside[1:-1]
    for index, character in enumerate(inside):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not inside[start:index].strip():
            quote = character
        elif character in "[({":
            depth += 1
        elif character in "])}":
            depth -= 1
        elif character == "," and depth == 0:
            entries.append(inside[start:index].strip())
            start = index + 1
    if depth or quote:  # the brackets belong to file names
        return [entry.strip() for entry in inside.split(",")]
    last = inside[start:].strip()
    return [*entries, last] if entries or last else []


def _kind(key: str) -> Literal["text", "texts", "group", "other"]:
    """Return what a key takes; a group takes the name of an option, or keys with values."""
    if key in _HYDRA_TEXTS:
        return "text"
    hint: Any = RunConfig
    for part in key.split("."):
        if not dataclasses.is_dataclass(hint):
            # a mapping, such as prompt.by_modality
            return "text" if str in typing.get_args(hint)[1:] else "other"
        hint = typing.get_type_hints(hint).get(part)
    if hint is str or str in typing.get_args(hint):
        return "texts" if typing.get_origin(hint) is tuple else "text"
    return "group" if dataclasses.is_dataclass(hint) else "other"


def explain(error: Exception) -> str:
    """Explain an error of Hydra, OmegaConf or YAML on one line, with what to do."""
    if isinstance(error, OverrideParseException):
        return _explain_override(error)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in error.options if not option.startswith("_")]
        near = closest(name, options)
        meant = f"did you mean {near}? " if near else ""
        return f"{group}={name}: option not found; {meant}choose one of {', '.join(options)}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return f"{error.missing_cfg_file}: YAML file not found in rlmed's conf/ or a folder given with --config-dir"
    if isinstance(error, UnicodeDecodeError):
        line = error.object.splitlines()[error.object.count(b"\n", 0, error.start)]
        return f"a YAML file of the configuration is not UTF-8, see {line!r} in it: save it as UTF-8"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1} is not valid YAML ({error.problem}): fix that line"
    if isinstance(error, OmegaConfBaseException):
        advice = ""
        if "nterpolation" in type(error).__name__ + str(error):
            advice = r": correct the key in ${…}, or write \${ for a literal ${"
        said = str(error).partition("\n")[0].rstrip(".")
        key = "" if error.full_key is None or str(error.full_key) in said else f"{error.full_key}: "
        return f"{key}{said}{advice}"
    said = one_line(error)
    sweep = re.match("Ambiguous value for argument '(.*?)' 1[.]|Sweep parameters '(.*)' require", said)
    if sweep:
        return f"{sweep[1] or sweep[2]}: several values need --multirun, and a list is written [1,2]"
    twice = re.match(r"Multiple values for (\w+)[.]", said)
    if twice:
        return f"{twice[1]} is given twice, but a run takes exactly one {twice[1]}: drop all but one {twice[1]}="
    cause = error.__cause__
    return f"{said} ({explain(cause)})" if isinstance(cause, OmegaConfBaseException) else said


def _explain_override(error: OverrideParseException) -> str:
    override = error.override
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is not of the form key=value: no spaces around =, and quotes around a value with spaces"
    if _parse(f"{key}=1") is None:
        return f"{override}: invalid key {key!r}: keys are letters, digits and _, separated by dots, as in learner.lr"
    said = one_line(error).partition("See https")[0].rstrip(" .")
    if said.startswith("LexerNoViableAlt"):
        said = "it contains an invalid character"
    if value.lstrip().startswith("["):
        return f"{override}: not a list ({said}): put entries with commas or brackets in quotes, as {key}=['a,b','c']"
    if value.lstrip().startswith("{"):
        return (
            f"{override}: not a mapping {{KEY:VALUE}} ({said}). Keys are letters, digits, - and _ on the command "
            "line; others go into a YAML file of yours: --config-dir DIR +experiment=NAME reads DIR/experiment/NAME.yaml"
        )
    return f"{override}: {value!r} cannot be read ({said}): write \"{key}='…'\" with the value in both kinds of quotes"
