"""What the commands share: Hydra with a few shorthands that are expanded before it sees them.

| written | means |
| --- | --- |
| `+experiment=X` where no CUDA device is | `+experiment=X_embedded`, if there is one (`profile=paper` keeps X) |
| `model=DIR` | `model.path=DIR` |
| `data=a.jsonl` | `data=jsonl data.eval=[a.jsonl]` |
| `resume=auto` | goes on in the newest run folder of the same name that has a checkpoint; starts anew if there is none |
| `resume=RUN_FOLDER` | goes on in that folder |
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rewards.extra import RewardError
from rlmed.checkpoint import CheckpointError
from rlmed.core.config import RunConfig, build_config, check_key

EMBEDDED_SUFFIX = "_embedded"


def group_options(group: str) -> list[str]:
    """Names of the YAML files in `conf/<group>/`."""
    folder = resources.files("conf").joinpath(group)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


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
        if equals and key[:1].isalpha() and "@" not in key and key.split(".")[0] != "hydra":
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
        return [f"model.path={value}"]
    if key == "data" and value.endswith((".jsonl", "]")):
        files = value if value.startswith("[") else f"[{value}]"
        return ["data=jsonl", f"data.eval={files}"]
    if key == "resume" and value not in ("auto", "null", ""):
        folder = Path(value)
        if not (folder / "checkpoints").is_dir():
            raise ValueError(f"resume={value}: no checkpoints in that folder; give the folder of a run, or resume=auto")
        return [f"resume={value}", f"hydra.run.dir={value}"]
    return [argument]


def compose_config(program: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration that `python -m rlmed.<program>` would run with these overrides, outside of a command.

    Args:
        program: "train", "sft" or "evaluate".
        overrides: as on the command line, without shorthands.

    Raises:
        ConfigError: for an unknown key or impossible value.
    """
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return _validated(hydra.compose(program, overrides=list(overrides)))


def _validated(composed: DictConfig) -> RunConfig:
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return build_config({str(key): value for key, value in plain.items()})


def newest_run(folder: Path) -> Path | None:
    """The run that `resume=auto` means for a run about to start in `folder`.

    That is `folder` itself when it holds a checkpoint, else the latest folder beside it that does.
    """
    folders = [path for path in folder.parent.glob("*") if any((path / "checkpoints").glob("step-*"))]
    if folder in folders:
        return folder
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def run_command(program: str, main: Callable[[RunConfig, Path], None]) -> None:
    """Compose the configuration from the command line and call `main(config, run_folder)`.

    Errors in what the user gave end the program with one line and exit status 2; RLMED_TRACE=1 shows where they came from.
    """
    try:
        sys.argv[1:] = expand(sys.argv[1:], cuda=torch.cuda.is_available())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error

    transformers.utils.logging.disable_progress_bar()  # ours are enough

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name=program)
    def entry(composed: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            config = _validated(composed)
            if config.resume == "auto":
                folder = newest_run(folder) or folder
            main(config, folder)
        except (ValueError, OSError, RewardError, CheckpointError, KeyboardInterrupt) as error:
            if os.environ.get("RLMED_TRACE"):
                raise
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit("interrupted; go on with resume=auto") from None
            sys.stderr.write(f"error: {error}\n(RLMED_TRACE=1 shows where it came from)\n")
            raise SystemExit(2) from error

    entry()


def to_yaml(config: RunConfig) -> str:
    """The validated configuration as YAML, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(dataclasses.asdict(config))))


MAY_CHANGE = ("resume", "profile", "eval", "checkpoint", "preflight", "cluster", "sft")
"""Keys that may differ between a run and its resumption, since they do not change what is learnt."""


def check_same_run(saved: Path, config: RunConfig) -> None:
    """Make sure that a run is resumed with the settings it was started with.

    Raises:
        ValueError: naming each key that differs, with both values.
    """
    before = OmegaConf.to_container(OmegaConf.load(saved))
    after = _plain(dataclasses.asdict(config))
    assert isinstance(before, dict)
    different = [
        f"{key}: {_flat(before)[key]!r} then, {value!r} now"
        for key, value in _flat(after).items()
        if key.split(".")[0] not in MAY_CHANGE and _flat(before).get(key) != value
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
