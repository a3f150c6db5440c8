"""What the commands share: from the command line (see `rlmed.overrides`) to a configuration and a folder, and exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rewards.extra import RewardError
from rlmed.checkpoint import CheckpointError, list_checkpoints, starting_point
from rlmed.core.config import RunConfig
from rlmed.core.config_building import build_config
from rlmed.core.config_checks import ConfigError
from rlmed.core.config_use import Refusal, check_used, find_unused
from rlmed.core.display import ERRORS, TRACE, ending_errors, keep_display, lacks_memory, one_line
from rlmed.core.files import refusal
from rlmed.core.holding import hold
from rlmed.core.ownership import remove_leftovers
from rlmed.core.protocols import ClusterError
from rlmed.models.logs import silence_progress_bars
from rlmed.overrides import CONFIG_GROUPS, expand, explain, quoted

LOST = 3
"""Exit status when a process of the run was lost: the same command with resume=auto goes on."""
FOLDER_KEY = "hydra.run.dir="
SEARCH_KEY = "hydra.searchpath="
PROBE = b"." * 2**16
"""Written to find out whether a folder can be written to; more than the few bytes that a full disk may still take."""


SPARING = {
    "train": "learner.token_budget, rollout.max_completions, learner.gradient_checkpointing=true",
    "sft": "learner.token_budget, learner.gradient_checkpointing=true",
    "evaluate": "rollout.max_completions, rollout.prefill_tokens",
}
"""Settings by which each program needs less memory."""


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
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    if "experiment" in plain:
        raise ConfigError(
            "the file of +experiment=NAME must begin with the line `# @package _global_`, and hold keys with values"
        )
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
            raise ConfigError(explain(error)) from error


def _check_used(program: str) -> None:
    """Make sure that all overrides of the configuration that Hydra has composed do something in `program`."""
    own = HydraConfig.get()
    places = [entry for entry in own.overrides.hydra if entry.startswith(SEARCH_KEY)]
    check_used(
        program,
        own.overrides.task,
        CONFIG_GROUPS,
        lambda entries: _plain_config(hydra.compose(own.job.config_name, [*entries, *places])),
    )


def newest_run(folder: Path) -> Path | None:
    """The run that `resume=auto` means for a run about to start in `folder`: the latest beside it with a checkpoint."""
    ages = {}
    for path in folder.parent.glob("*"):
        with suppress(FileNotFoundError):  # it is being removed
            if list_checkpoints(path / "checkpoints"):
                ages[path] = path.stat().st_mtime
    return max(ages, key=ages.__getitem__, default=None)


def run_command(program: str, main: Callable[[RunConfig, Path], None]) -> None:
    """Compose the configuration from the command line and call `main(config, run_folder)`; the folder is this process's alone.

    Errors in what the user gave end the program with one line and exit status 2, lost processes with 3; RLMED_TRACE=1
    shows where they came from.
    """
    keep_display()
    silence_progress_bars()
    # it warns of each retry; what comes of them is said by load_config
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.raiseExceptions = False  # a log that cannot be written is lost, and the run goes on
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come here, instead of being printed

    with _ending_errors(program):
        flags = _parse_flags(sys.argv[1:])
        overrides = expand(flags.overrides, cuda=torch.cuda.is_available(), sweeps=flags.multirun)
        _check_places(overrides, sweeps=flags.multirun)
        if flags.config_dir is not None:
            overrides.append(_search_path(flags.config_dir))
        if not _is_unicode([*overrides, os.getcwd()]):
            overrides.append("hydra.output_subdir=null")  # its files of the overrides are UTF-8 and nothing else
        name = flags.config_name or program
        if flags.multirun:
            sweep_dir = f"hydra.sweep.dir=outputs/${{name}}/sweep_${{now:%Y-%m-%d_%H-%M-%S}}_{os.getpid()}"
            _call_hydra(name, _Job(program, main, held=False), [sweep_dir, *overrides], "--multirun")
        elif flags.shown:
            _call_hydra(name, _Job(program, main, held=False), overrides, *flags.shown)
        else:
            folder = _choose_folder(program, name, overrides)
            # the libraries that save models take text only
            if program != "evaluate" and not _is_unicode([str(folder)]):
                raise ValueError(
                    f"{str(folder)!r}: no checkpoint can be written there, for this name is no text under the locale of this "
                    f"terminal: set LC_ALL=C.UTF-8, or choose another with {FOLDER_KEY}FOLDER"
                )
            with hold(folder, cure=f"wait until it has ended, or choose another folder with {FOLDER_KEY}FOLDER"):
                for place in (folder, folder / "checkpoints", folder / "evaluations"):
                    if place.exists():
                        check_writable(place)
                    remove_leftovers(place, "*", held=True)
                _call_hydra(
                    name, _Job(program, main, held=True), [*overrides, FOLDER_KEY + quoted(str(folder), commas=False)]
                )


@dataclass(frozen=True)
class _Job:
    """What Hydra calls."""

    program: str
    main: Callable[[RunConfig, Path], None]
    held: bool
    """Whether the folder is this process's alone already; each job of a sweep has one of its own."""

    def __call__(self, composed: DictConfig) -> None:
        with _ending_errors(self.program):
            folder = Path(HydraConfig.get().runtime.output_dir)
            config = build_config(_plain_config(composed))
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.FileHandler):  # made by Hydra, for the characters of this place alone
                    handler.stream.reconfigure(encoding="utf-8", errors=ERRORS)  # type: ignore[union-attr]
            if self.held:
                self.main(config, folder)
                return
            _check_used(self.program)
            if config.resume is not None:
                raise ValueError(
                    f"resume={config.resume} is for one run, and --multirun makes new ones: leave one of them out"
                )
            with hold(folder):
                self.main(config, folder)


@contextmanager
def _ending_errors(program: str) -> Iterator[None]:
    goes_on = "" if program == "evaluate" else "; resume=auto goes on from the last checkpoint, if there is one"
    with ending_errors(RewardError, CheckpointError, interrupted=f"interrupted{goes_on}"):
        try:
            yield
        except ClusterError as error:
            if os.environ.get(TRACE):
                raise
            sys.stderr.write(f"error: {one_line(error)}\n")
            raise SystemExit(LOST) from error
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(explain(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            raise ValueError(f"{one_line(error)} ({SPARING[program]}){goes_on}") from error


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Overrides, and which of Hydra's flags are set; `shown` are those that show something instead of a run.

    Raises:
        ValueError: for a flag that there is not.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}: --hydra-help shows the flags, and settings are written key=value")

    parser.error = refuse  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(arguments)
    for flag in ("config_path", "experimental_rerun"):
        if vars(flags)[flag] is not None:
            raise ValueError(
                f"--{flag.replace('_', '-')} is not possible: --config-dir DIR adds YAML files of your own"
            )
    flags.multirun = flags.multirun or any(entry.upper() == "HYDRA.MODE=MULTIRUN" for entry in flags.overrides)
    shown = [f"--{flag.replace('_', '-')}" for flag in ("help", "hydra_help", "shell_completion") if vars(flags)[flag]]
    for flag in ("cfg", "package", "info"):
        if vars(flags)[flag] is not None:
            shown += [f"--{flag}", vars(flags)[flag]]
    flags.shown = [*shown, *(["--resolve"] if flags.resolve else [])]
    return flags


def _check_places(overrides: Sequence[str], *, sweeps: bool) -> None:
    """Make sure that a folder is named for what is run: one run, or a sweep of several.

    Raises:
        ValueError: for a folder that Hydra would not look at.
    """
    unread, why, instead = (
        (FOLDER_KEY, "is for one run, and --multirun makes several", "hydra.sweep.dir=FOLDER")
        if sweeps
        else ("hydra.sweep.", "is for --multirun", f"{FOLDER_KEY}FOLDER")
    )
    for entry in overrides:
        if entry.lstrip("+").startswith(unread):
            raise ValueError(f"{entry} {why}: set {instead}")


def _search_path(folder: str) -> str:
    """The override by which Hydra also finds the YAML files in `folder`."""
    if not Path(folder).is_dir():
        raise ValueError(f"--config-dir {folder}: there is no such folder")
    return f"{SEARCH_KEY}[{quoted('file://' + str(Path(folder).absolute()), commas=False)}]"


def _is_unicode(texts: Sequence[str]) -> bool:
    """False where a name of a file, as its system gave it, is no text in this place's encoding."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for text in texts for character in text)


def _call_hydra(name: str, job: _Job, overrides: Sequence[str], *flags: str) -> None:
    sys.argv[1:] = [*overrides, *flags]
    hydra.main(version_base="1.3", config_path="pkg://conf", config_name=name)(job)()


def _choose_folder(program: str, name: str, overrides: Sequence[str]) -> Path:
    """The folder of the run that the overrides describe, made where there is none.

    Raises:
        ConfigError: for an unknown key or impossible value.
        RecordError: when it cannot be made.
    """
    with hydra.initialize_config_module("conf", version_base="1.3"):
        try:
            composed = hydra.compose(name, overrides=list(overrides), return_hydra_config=True)
        except UnicodeDecodeError as error:
            raise ValueError(explain(error)) from error
        HydraConfig.instance().set_config(composed)  # which the folder's name may ask
        place = str(composed.hydra.run.dir)
        with open_dict(composed):
            del composed["hydra"]
        config = build_config(_plain_config(composed))
        _check_used(program)
    if not place:
        raise ValueError(f"{FOLDER_KEY} names no folder")
    folder = Path(place).absolute()
    named = any(entry.lstrip("+").startswith(FOLDER_KEY) for entry in overrides)
    try:
        if named:
            # Hydra would write there before the program's own code looks
            checkpoint = starting_point(folder, resume=config.resume is not None)
            if config.resume == "auto" and checkpoint is None:
                _say_anew(folder)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        earlier = newest_run(folder) if config.resume == "auto" else None
        if config.resume == "auto" and earlier is None:
            _say_anew(folder.parent)
        return earlier or new_folder(folder)
    except OSError as error:
        raise refusal(folder, error, cure=f"try again, or choose another with {FOLDER_KEY}FOLDER") from error


def _say_anew(place: Path) -> None:
    """That `resume=auto` has found no checkpoint in `place`."""
    sys.stdout.write(f"resume=auto: nothing to resume in {place}, the run starts from step 1\n")
    sys.stdout.flush()


def new_folder(wanted: Path) -> Path:
    """Make the folder, or one with a number behind its name where another process was faster."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return folder


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
