"""What people write on the command line, as Hydra takes it: shorthands, and file names as they are.

| written | means |
| --- | --- |
| `+experiment=X` where no CUDA device is | `+experiment=X_embedded`, if there is one (`profile=paper` keeps X) |
| `experiment=X`, `debug=X` | `+experiment=X`, `+debug=X` |
| `model=DIR` | `model.path=DIR` |
| `data=a.jsonl` | `data=jsonl data.eval=[a.jsonl]` |
| `resume=auto` | goes on in `hydra.run.dir`, if given, else in the newest run of that name with a checkpoint; or starts anew |
| `resume=RUN_FOLDER` | goes on in that folder |

A value that Hydra's grammar has no place for (`data.train=测试.jsonl`, `data.eval=[fold=2.jsonl]`), or would take for something
else than the text that its key expects (`name=2024`), is put in quotes. What is in quotes already is left to Hydra.
"""

from __future__ import annotations

import dataclasses
import difflib
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

from rlmed.core.config import RunConfig
from rlmed.core.config_building import check_key
from rlmed.core.display import one_line
from rlmed.core.litter import is_litter
from rlmed.data.other_formats import to_prepare

CONFIG_GROUPS = tuple(sorted(entry.name for entry in resources.files("conf").iterdir() if entry.is_dir()))
EMBEDDED_SUFFIX = "_embedded"
ADDED_GROUPS = ("experiment", "debug")
"""Groups of which a run has no option unless one is asked for."""
ROWS_ENDING = ".jsonl"
_HYDRA_TEXTS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name")


def group_options(group: str) -> list[str]:
    """Names of the YAML files in `conf/<group>/` that are options, and not what options share."""
    folder = resources.files("conf").joinpath(group)
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return sorted(name.removesuffix(".yaml") for name in names if not name.startswith("_") and not is_litter(name))


def expand(arguments: Sequence[str], *, cuda: bool, sweeps: bool = False) -> list[str]:
    """The command line after the program's name, with the shorthands of the module docstring expanded and values quoted.

    Args:
        arguments: overrides; what begins with a dash stays as it is.
        cuda: whether there is a CUDA device.
        sweeps: commas part several values, as with `--multirun`.

    Raises:
        ValueError: for a key or profile that does not exist, a profile that does nothing, a resume folder without a checkpoint,
            or a shorthand beside what it stands for.
    """
    entries = [_without_spaces(entry) for entry in arguments]
    for entry in entries:
        key, equals, _ = entry.partition("=")
        # +key and ~key change the composition itself, and so does group@package; hydra.key is Hydra's own
        known = key in ADDED_GROUPS or "@" in key or re.split(r"[./]", key)[0] == "hydra"
        if equals and not key:
            raise ValueError(f"{entry}: no key stands before =")
        if equals and key[:1].isalpha() and not known:
            check_key(key)
    profile = [entry.partition("=")[2] for entry in ("profile=auto", *entries) if entry.startswith("profile=")][-1]
    if profile not in ("auto", "embedded", "paper"):
        raise ValueError(f"profile={profile} is not possible: choose one of auto, embedded, paper")
    _check_profile(profile, entries)
    embedded = profile == "embedded" or (profile == "auto" and not cuda)
    sweeps = sweeps or "--multirun" in entries
    expanded = [(entry, new) for entry in entries for new in _expand_one(entry, embedded)]
    _check_shorthands(expanded)
    return [new if new.startswith("-") else in_hydras_grammar(new, sweeps=sweeps) for _, new in expanded]


def _check_profile(profile: str, entries: Sequence[str]) -> None:
    """Raises ValueError for a profile that an experiment does not have."""
    for entry in entries:
        key, _, value = entry.partition("=")
        for name in _names(value) if key.lstrip("+") == "experiment" else ():
            plain = name.removesuffix(EMBEDDED_SUFFIX)
            if profile == "paper" and name != plain:
                raise ValueError(f"{entry} is the embedded profile itself: give +experiment={plain} with profile=paper")
            if profile == "embedded" and f"{plain}{EMBEDDED_SUFFIX}" not in group_options("experiment"):
                raise ValueError(
                    f"{entry} has no embedded profile (there is no {plain}{EMBEDDED_SUFFIX}): leave profile=embedded out"
                )


def _check_shorthands(expanded: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError where a shorthand sets what another argument sets too; pairs of what is written and what it means."""
    for written, meant in expanded:
        key = meant.partition("=")[0]
        others = [other for other, also in expanded if other != written and also.partition("=")[0] == key]
        if others and key.lstrip("+") != written.partition("=")[0].lstrip("+"):
            raise ValueError(f"{written} and {others[0]} both set {key}: leave one of them out")


def _names(value: str) -> list[str]:
    """One name, or several for `--multirun`."""
    return [name.strip().strip("'\"") for name in value.split(",")]


def _without_spaces(argument: str) -> str:
    """`steps = 5`, in quotes for the shell, as `steps=5`."""
    key, equals, value = argument.partition("=")
    return argument if key.startswith("-") else f"{key.strip()}{equals}{value}"


def _expand_one(argument: str, embedded: bool) -> list[str]:
    key, equals, value = argument.partition("=")
    if not equals:
        return [argument]
    if value.startswith("~/"):  # which shells leave as it is behind =
        value = os.path.expanduser(value)
        argument = f"{key}={value}"
    plain = key.lstrip("+")
    if plain in CONFIG_GROUPS and plain != "model" and (value == "null" or _names_options(plain, value)):
        raise ValueError(f"{argument}: one run has one {plain}: choose one of {', '.join(group_options(plain))}")
    if plain in ADDED_GROUPS:
        options = group_options(plain)
        names = _names(value)
        if plain == "debug" and not set(names) <= set(options):
            return [argument]
        names = [
            f"{name}{EMBEDDED_SUFFIX}" if embedded and name + EMBEDDED_SUFFIX in options else name for name in names
        ]
        return [f"+{plain}={','.join(names)}"]
    if key.startswith("+") and _kind(plain) == "group":  # of these there is one already, and + would be a second
        return _expand_one(f"{plain}={value}", embedded)
    if key == "model" and value not in group_options("model"):
        return [f"model.path={quoted(value)}"]
    if key == "data" and value.endswith((ROWS_ENDING, f"{ROWS_ENDING}'", f'{ROWS_ENDING}"', "]")):
        return ["data=jsonl", f"data.eval={value if value.startswith('[') else f'[{_files(value)}]'}"]
    if key == "data" and value not in group_options("data") and (other := to_prepare(Path(_unquoted(value)))):
        raise ValueError(f"data={value}: {other}")
    if key == "data" and re.match(r"[^{$]*[./\\]", value):
        raise ValueError(
            f"data={value}: questions are read from JSON Lines files, whose names end in {ROWS_ENDING}; `python -m "
            "rlmed.prepare` makes them of tables and of published data (docs/data.md)"
        )
    if key == "resume" and value not in ("auto", "null", ""):
        folder = Path(_unquoted(value))
        if not (folder / "checkpoints").is_dir():
            raise ValueError(f"resume={value}: no checkpoints in that folder; give the folder of a run, or resume=auto")
        return [f"resume={quoted(value)}", f"hydra.run.dir={quoted(value)}"]
    return [argument]


def _names_options(group: str, value: str) -> bool:
    """Whether a value is a list of options: Hydra would put one over the other."""
    entries = _entries(value)
    return entries is not None and {entry.strip("'\"") for entry in entries} <= {*group_options(group)}


def _files(value: str) -> str:
    """One file or several with commas between them; a comma before anything but another file is one of the name."""
    parts = value.split(",")
    several = all(part.strip().endswith(ROWS_ENDING) for part in parts)
    return ",".join(map(quoted, parts)) if several else quoted(value, commas=False)


def quoted(path: str, *, commas: bool = True) -> str:
    """A text as Hydra's grammar takes it: in quotes where it could be taken for something else.

    Args:
        path: the text; one that is in quotes already stays as it is.
        commas: leave those that are there, since with `--multirun` they part several paths.
    """
    plain = re.fullmatch(r"[A-Za-z_./][\w./:+,-]*" if commas else r"[A-Za-z_./][\w./:+-]*", path, re.ASCII)
    if (plain and path.lower() not in ("null", "true", "false", "inf", "nan")) or _is_quoted(path):
        return path
    # backslashes are themselves, but for those before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (r"\'" if found[2] else ""), path) + "'"


def _is_quoted(text: str) -> bool:
    parsed = _parse(f"key={text}")
    return text[:1] in ("'", '"') and parsed is not None and not parsed.is_sweep_override()


def _unquoted(text: str) -> str:
    parsed = _parse(f"key={text}") if _is_quoted(text) else None
    return text if parsed is None else str(parsed.value())


def _parse(override: str) -> Override | None:
    """What Hydra makes of an override; None where its grammar, or a function that it sees there, refuses."""
    try:
        parsed = OverridesParser.create().parse_override(override)
        if not parsed.is_sweep_override():
            parsed.value()
    except HydraException:
        return None
    return parsed


def in_hydras_grammar(override: str, *, sweeps: bool) -> str:
    """The override with its value in quotes where Hydra would refuse it, or not take it for the text that is meant.

    Args:
        override: as it was written, shorthands expanded.
        sweeps: with `--multirun`, where commas part several values.
    """
    key, equals, value = override.partition("=")
    if not equals or _parse(f"{key}=1") is None:  # a key that is none is told by `explain`
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
        return override  # as a text it would be refused for its type
    else:
        new = f"{key}={quoted(value, commas=False)}"
    return override if _parse(new) is None else new


def _stays(value: str, kind: str, *, sweeps: bool | None = None) -> bool:
    """Whether Hydra takes the value as it is meant; `sweeps` is None for an entry of a list, which is no sweep."""
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
    """Whether commas part entries of a list that was written without brackets."""
    parts = value.split(",")
    return len(parts) > 1 and (key != "data.eval" or all(part.strip().endswith(ROWS_ENDING) for part in parts))


def _entries(value: str) -> list[str] | None:
    """The entries of a list as they were written; None for something else."""
    inside = value.strip()
    if not (inside.startswith("[") and inside.endswith("]")):
        return None
    entries, start, depth, quote = [], 0, 0, ""
    inside = inside[1:-1]
    for place, character in enumerate(inside):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not inside[start:place].strip():
            quote = character
        elif character in "[({":
            depth += 1
        elif character in "])}":
            depth -= 1
        elif character == "," and depth == 0:
            entries.append(inside[start:place].strip())
            start = place + 1
    if depth or quote:  # brackets that belong to names
        return [entry.strip() for entry in inside.split(",")]
    last = inside[start:].strip()
    return [*entries, last] if entries or last else []


def _kind(key: str) -> Literal["text", "texts", "group", "other"]:
    """What a key of the configuration takes: a group the name of an option, or keys with values."""
    if key in _HYDRA_TEXTS:
        return "text"
    hint: Any = RunConfig
    for part in key.split("."):
        if not dataclasses.is_dataclass(hint):
            return "text" if str in typing.get_args(hint)[1:] else "other"  # a mapping, such as prompt.by_modality
        hint = typing.get_type_hints(hint).get(part)
    if hint is str or str in typing.get_args(hint):
        return "texts" if typing.get_origin(hint) is tuple else "text"
    return "group" if dataclasses.is_dataclass(hint) else "other"


def explain(error: Exception) -> str:
    """What an error of Hydra's, OmegaConf's or YAML's means and what to do, on one line."""
    if isinstance(error, OverrideParseException):
        return _explain_override(error)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        near = difflib.get_close_matches(name, error.options, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        return f"{group}={name}: there is no such option; {meant}choose one of {', '.join(error.options)}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return f"{error.missing_cfg_file}: there is no such YAML file in rlmed's conf/ nor in a folder given with --config-dir"
    if isinstance(error, UnicodeDecodeError):
        line = error.object.splitlines()[error.object.count(b"\n", 0, error.start)]
        return f"a YAML file of the configuration is no UTF-8, see {line!r} in it: save it as UTF-8"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1} is no YAML ({error.problem}): mend it there"
    if isinstance(error, OmegaConfBaseException):
        cure = ""
        if "nterpolation" in type(error).__name__ + str(error):
            cure = r": mend what ${…} names, or write \${ where the signs themselves are meant"
        said = str(error).partition("\n")[0].rstrip(".")
        place = "" if error.full_key is None or str(error.full_key) in said else f"{error.full_key}: "
        return f"{place}{said}{cure}"
    said = one_line(error)
    sweep = re.match("Ambiguous value for argument '(.*?)' 1[.]|Sweep parameters '(.*)' require", said)
    if sweep:
        return f"{sweep[1] or sweep[2]}: several values need --multirun, and a list is written [1,2]"
    twice = re.match(r"Multiple values for (\w+)[.]", said)
    if twice:
        return f"{twice[1]} is given twice: one run has one {twice[1]}; leave out all but one {twice[1]}="
    cause = error.__cause__
    return f"{said} ({explain(cause)})" if isinstance(cause, OmegaConfBaseException) else said


def _explain_override(error: OverrideParseException) -> str:
    override = error.override
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is no override of the form key=value: no spaces around =, and quotes around a value with spaces"
    if _parse(f"{key}=1") is None:
        return f"{override}: {key!r} is no key: keys are letters, digits and _, with dots between them, as learner.lr"
    said = one_line(error).partition("See https")[0].rstrip(" .")
    if said.startswith("LexerNoViableAlt"):
        said = "it holds a character that has no place there"
    if value.lstrip().startswith("["):
        return f"{override}: not a list ({said}): put entries with commas or brackets in quotes, as {key}=['a,b','c']"
    if value.lstrip().startswith("{"):
        return (
            f"{override}: not keys with values as {{KEY:VALUE}} ({said}). Keys are letters, digits, - and _ on the command "
            "line; others go into a YAML file of yours: --config-dir DIR +experiment=NAME reads DIR/experiment/NAME.yaml"
        )
    return f"{override}: {value!r} cannot be read ({said}): write \"{key}='…'\" with the value in both kinds of quotes"
