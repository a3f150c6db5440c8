"""What the commands share: Hydra with a few shorthands that are expanded before it sees them.

| written | means |
| --- | --- |
| `+experiment=X` where no CUDA device is | `+experiment=X_embedded`, if there is one (`profile=paper` keeps X) |
| `model=DIR` | `model.path=DIR` |
| `data=a.jsonl` | `data=jsonl data.eval=[a.jsonl]` |
| `resume=auto` | goes on in `hydra.run.dir`, if given, else in the newest run of that name with a checkpoint; or starts anew |
| `resume=RUN_FOLDER` | goes on in that folder |
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rewards.extra import RewardError
from rlmed.checkpoint import CheckpointError
from rlmed.core.config import RunConfig
from rlmed.core.config_building import build_config, check_key
from rlmed.core.config_checks import ConfigError
from rlmed.core.config_use import Refusal, check_used, find_unused
from rlmed.core.files import refusal
from rlmed.core.litter import is_litter
from rlmed.core.protocols import ClusterError
from rlmed.models.logs import silence_progress_bars

EMBEDDED_SUFFIX = "_embedded"
CONFIG_GROUPS = tuple(sorted(entry.name for entry in resources.files("conf").iterdir() if entry.is_dir()))
LOST = 3
"""Exit status when a process of the run was lost: the same command with resume=auto goes on."""
PROBE = b"." * 2**16
"""Written to find out whether a folder can be written to; more than the few bytes that a full disk may still take."""


def group_options(group: str) -> list[str]:
    """Names of the YAML files in `conf/<group>/` that are options, and not what options share."""
    folder = resources.files("conf").joinpath(group)
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return sorted(name.removesuffix(".yaml") for name in names if not name.startswith("_") and not is_litter(name))


def expand(arguments: Sequence[str], *, cuda: bool) -> list[str]:
    """Expand the shorthands of the module docstring.

    Args:
        arguments: the command line after the program's name.
        cuda: whether there is a CUDA device.

    Raises:
        ValueError: for a key or profile that does not exist, or a resume folder without a checkpoint.
    """
    for entry in arguments:
        key, equals, _ = entry.partition("=")
        # +key and ~key change the composition itself, and so does group@package; hydra.key is Hydra's own
        if equals and key[:1].isalpha() and "@" not in key and re.split(r"[./]", key)[0] != "hydra":
            check_key(key)
    profile = next((entry.partition("=")[2] for entry in arguments if entry.startswith("profile=")), "auto")
    if profile not in ("auto", "embedded", "paper"):
        raise ValueError(f"profile={profile} is not possible: choose one of auto, embedded, paper")
    embedded = profile == "embedded" or (profile == "auto" and not cuda)
    return [new for entry in arguments for new in _expand_one(entry, embedded)]


def _expand_one(argument: str, embedded: bool) -> list[str]:
    key, equals, value = argument.partition("=")
    if not equals:
        return [argument]
    if key == "+experiment" and embedded and value + EMBEDDED_SUFFIX in group_options("experiment"):
        return [f"{key}={value}{EMBEDDED_SUFFIX}"]
    if key == "model" and value not in group_options("model"):
        return [f"model.path={quoted(value)}"]
    if key == "data" and value.endswith((".jsonl", "]")):
        files = value if value.startswith("[") else f"[{quoted(value)}]"
        return ["data=jsonl", f"data.eval={files}"]
    if key == "data" and value.endswith((".csv", ".tsv", ".json", ".parquet")):
        raise ValueError(
            f"data={value}: questions are read from JSON Lines; `python -m rlmed.prepare` makes them of tables and of "
            "published data (docs/data.md)"
        )
    if key == "resume" and value not in ("auto", "null", ""):
        folder = Path(value)
        if not (folder / "checkpoints").is_dir():
            raise ValueError(f"resume={value}: no checkpoints in that folder; give the folder of a run, or resume=auto")
        return [f"resume={quoted(value)}", f"hydra.run.dir={quoted(value)}"]
    return [argument]


def quoted(path: str) -> str:
    """A path as Hydra's grammar takes it: in quotes where it could be taken for something else.

    Commas stay, since with `--multirun` they part several paths; quotes that are there already stay too.
    """
    plain = re.fullmatch(r"[A-Za-z_./][\w./:+,-]*", path, re.ASCII)
    if (plain and path not in ("null", "true", "false", "inf", "nan")) or re.fullmatch(r"'.*'|\".*\"", path):
        return path
    return "'" + path.replace("'", r"\'") + "'"


def compose_config(program: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration that `python -m rlmed.<program>` would run with these overrides, outside of a command.

    Args:
        program: "train", "sft" or "evaluate".
        overrides: as on the command line, without shorthands.

    Raises:
        ConfigError: for an unknown key or impossible value.
    """
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return build_config(_plain_config(hydra.compose(program, overrides=list(overrides))))


def _plain_config(composed: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def unused_overrides(program: str, overrides: Sequence[str]) -> list[Refusal]:
    """The overrides that `python -m rlmed.<program>` would refuse since it doesn't read them, outside of a command.

    Raises:
        ConfigError: for what Hydra cannot compose.
    """
    with hydra.initialize_config_module("conf", version_base="1.3"):
        try:
            return find_unused(
                program, overrides, CONFIG_GROUPS, lambda entries: _plain_config(hydra.compose(program, list(entries)))
            )
        except (HydraException, OmegaConfBaseException) as error:
            where = f"{error.override}: " if isinstance(error, OverrideParseException) else ""
            raise ConfigError(where + " ".join(str(error).split())) from error


def newest_run(folder: Path) -> Path | None:
    """The run that `resume=auto` means for a run about to start in `folder`: the latest beside it with a checkpoint."""
    folders = [path for path in folder.parent.glob("*") if any((path / "checkpoints").glob("step-*"))]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def run_command(program: str, main: Callable[[RunConfig, Path], None]) -> None:
    """Compose the configuration from the command line and call `main(config, run_folder)`.

    Errors in what the user gave end the program with one line and exit status 2, lost processes with 3; RLMED_TRACE=1
    shows where they came from.
    """
    try:
        sys.argv[1:] = expand(sys.argv[1:], cuda=torch.cuda.is_available())
        if not any(entry.startswith("-") for entry in sys.argv[1:]):  # --help and its like write nothing
            check_writable(_output_folder(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error

    silence_progress_bars()
    # it warns of each retry; what comes of them is said by load_config
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name=program)
    def entry(composed: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            own = HydraConfig.get()
            check_used(
                program,
                own.overrides.task,
                CONFIG_GROUPS,
                lambda entries: _plain_config(hydra.compose(own.job.config_name, list(entries))),
            )
            config = build_config(_plain_config(composed))
            named = any(entry.startswith("hydra.run.dir=") for entry in HydraConfig.get().overrides.hydra)
            if config.resume == "auto" and not named:
                folder = newest_run(folder) or folder
            main(config, folder)
        except (ValueError, OSError, RewardError, CheckpointError, ClusterError, KeyboardInterrupt) as error:
            if os.environ.get("RLMED_TRACE"):
                raise
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit("interrupted; resume=auto goes on from the last checkpoint, if there is one") from None
            sys.stderr.write(f"error: {error}\n(RLMED_TRACE=1 shows where it came from)\n")
            raise SystemExit(LOST if isinstance(error, ClusterError) else 2) from error

    entry()


def check_writable(folder: Path) -> None:
    """Make sure that something can be written into `folder`, which is made if missing.

    Hydra writes there before the program's own code runs, and its errors would be tracebacks.

    Raises:
        RecordError: naming the folder and the cure.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(PROBE)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise refusal(folder, error, cure="try again, or choose another with hydra.run.dir=FOLDER") from error


def _output_folder(arguments: Sequence[str]) -> Path:
    """Where the run's folder is, or will be made."""
    named = [
        entry.partition("=")[2].strip("'\"").replace(r"\'", "'")
        for entry in arguments
        if entry.startswith("hydra.run.dir=")
    ]
    if named and "${" not in named[-1]:
        return Path(named[-1])
    return Path("outputs")


def to_yaml(config: RunConfig) -> str:
    """The validated configuration as YAML, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(dataclasses.asdict(config))))


MAY_CHANGE = ("resume", "profile", "checkpoint", "preflight", "cluster", "eval.every", "eval.at_start", "eval.at_end")
"""Keys that may differ between a run and its resumption: they change neither what is learnt nor what is compared."""


def check_same_run(saved: Path, config: RunConfig, *, unused: Collection[str]) -> None:
    """Make sure that a run is resumed with the settings it was started with.

    Args:
        saved: the run's `config.yaml`.
        config: what it is to go on with.
        unused: further keys that play no part in this kind of run.

    Raises:
        ValueError: naming each key that differs, with both values.
    """
    content = OmegaConf.to_container(OmegaConf.load(saved))
    assert isinstance(content, dict)
    before, after = _flat(content), _flat(_plain(dataclasses.asdict(config)))
    different = [
        f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
        for key in after | before  # a mapping, such as data.mix, may have had other entries then
        if not {key, key.split(".")[0]} & {*MAY_CHANGE, *unused} and before.get(key) != after.get(key)
    ]
    if different:
        raise ValueError(
            f"the run in {saved.parent} was started with other settings ({'; '.join(different)}): "
            "use the same ones to resume it, or resume=null for a new run"
        )


def _plain(value: Any) -> Any:
    """Tuples as lists, as YAML reads them back."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _flat(value: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        flat |= _flat(entry, f"{prefix}{key}.") if isinstance(entry, Mapping) else {f"{prefix}{key}": entry}
    return flat
