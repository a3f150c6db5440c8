"""Look at a command line as it was written: settings in another form, and what was left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rlmed.core.config.overrides import CONFIG_GROUPS, group_options
from rlmed.core.config.use import schema_keys
from rlmed.core.files.near_paths import near_path

DRY_RUN = "--dry-run"


def check_spelling(arguments: Sequence[str]) -> None:
    """Check for settings written as flags (`--steps 2`) or with spaces around =.

    Raises:
        ValueError: with the spelling that was meant.
    """
    known = set(schema_keys()) | set(CONFIG_GROUPS)
    for index, entry in enumerate(arguments):
        name, equals, value = entry.removeprefix("--").partition("=")
        if entry.startswith("-") and entry != DRY_RUN and re.sub("[-_]", "", name).lower() == "dryrun":
            raise ValueError(f"{entry}: did you mean {DRY_RUN}?")
        following = arguments[index + 1 : index + 3]
        if entry.startswith("--") and name in known:
            meant = value if equals else following[0] if following else "VALUE"
            raise ValueError(f"{entry}: settings are written key=value: did you mean {name}={meant}?")
        if name in known and (following[:1] == ["="] or (equals and not value and index + 1 < len(arguments))):
            meant = following[-1] if following[:1] == ["="] and len(following) > 1 else following[0]
            said = " ".join([entry, *following[: 2 if following[:1] == ["="] else 1]])
            raise ValueError(f"{said}: no spaces around =: did you mean {name}={meant}?")
        if name in known and not equals and not arguments[max(index - 1, 0)].startswith("-"):
            value = following[0] if following and not following[0].startswith("-") else ""
            if value.startswith("="):
                raise ValueError(f"{entry} {value}: no spaces around =: did you mean {name}{value}?")
            if value and "=" not in value:
                raise ValueError(f"{entry} {value}: settings are written key=value: did you mean {name}={value}?")
            raise ValueError(f"{entry}: settings are written key=value: give {name} a value")


def profile_notice(given: Sequence[str], overrides: Sequence[str]) -> str:
    """Return why `expand` has added the tiny profile; "" if it has not."""
    if "profile=tiny" in overrides and "profile=tiny" not in given:
        return "no CUDA device: profile=tiny. The paper's run, on a GPU, is the same command with profile=paper"
    if "+profile=tiny" in overrides and not any(entry.lstrip("+").startswith("profile=") for entry in given):
        return "no experiment, profile or model given: profile=tiny sets sizes and rates for the embedded model"
    return ""


def check_config_dir(folder: str, overrides: Sequence[str]) -> None:
    """Check that `folder`, of `--config-dir`, exists and is not the one above the YAML files.

    Raises:
        ValueError: with the folder that was meant, if there is one.
    """
    if not Path(folder).is_dir():
        advice = near_path(folder) or "correct the path"
        raise ValueError(f"--config-dir {folder}: folder not found in {Path.cwd()}: {advice}")
    for entry in overrides:
        group, _, name = entry.lstrip("+").partition("=")
        if group not in CONFIG_GROUPS or name in group_options(group):
            continue
        file = Path(group, f"{name}.yaml")
        if not Path(folder, file).exists() and Path(folder, "conf", file).exists():
            inside = Path(folder, "conf")
            raise ValueError(f"{entry}: {file} is not in --config-dir {folder}: did you mean --config-dir {inside}?")
