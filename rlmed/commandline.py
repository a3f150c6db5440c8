"""For all commands: turn arguments into configuration and run folder, errors into exit codes."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rewards.extra import RewardError
from rlmed.core.config.arguments import DRY_RUN, check_config_dir, check_spelling, profile_notice
from rlmed.core.config.building import build_config
from rlmed.core.config.composing import plain_config
from rlmed.core.config.help import help_text
from rlmed.core.config.overrides import CONFIG_GROUPS, expand, explain, quoted
from rlmed.core.config.rules import TRAINING
from rlmed.core.config.schema import RunConfig
from rlmed.core.config.use import check_used
from rlmed.core.files.atomic import refusal
from rlmed.core.files.exclusive import hold
from rlmed.core.files.ownership import remove_leftovers
from rlmed.core.plugins import beside
from rlmed.core.process.display import (
    ERRORS,
    TRACE,
    ending_errors,
    keep_display,
    lacks_memory,
    one_line,
    quiet_http_clients,
)
from rlmed.core.process.starting import loading_libraries
from rlmed.core.protocols import LOST, ClusterError
from rlmed.recording.checkpoint import CheckpointError, list_checkpoints, starting_point
from rlmed.run_folders import check_writable, new_folder, newest_run, report_fresh_start

log = logging.getLogger(__name__)

FOLDER_KEY = "hydra.run.dir="
SEARCH_KEY = "hydra.searchpath="

DryRun = Callable[[RunConfig, Path | None, float | None], None]
"""Tries a configuration, from a checkpoint on, as a command that began at a time would."""


def _check_used(program: str) -> None:
    """Check that every override of Hydra's current configuration has an effect in `program`."""
    own = HydraConfig.get()
    search_path = [entry for entry in own.overrides.hydra if entry.startswith(SEARCH_KEY)]
    check_used(
        program,
        own.overrides.task,
        CONFIG_GROUPS,
        lambda entries: plain_config(hydra.compose(own.job.config_name, [*entries, *search_path])),
    )


def run_command(program: str, main: Callable[[RunConfig, Path], None], dry_run: DryRun | None = None) -> None:
    """Compose the command line's configuration; call `main(config, run_folder)`, the folder locked.

    With `--dry-run`, call `dry_run(config, checkpoint, began)` instead, with the checkpoint to
    resume from and the time of `time.perf_counter` when the command began: there is no folder.

    User errors exit with one line and status 2, lost processes with status 3; RLMED_TRACE=1 shows
    tracebacks.
    """
    began = time.perf_counter()
    keep_display()
    # it warns of each retry; load_config reports the outcome
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    quiet_http_clients()
    logging.raiseExceptions = False  # the run continues if a log cannot be written
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise Hydra's errors instead of printing them

    with _ending_errors(program):
        flags = _parse_flags(sys.argv[1:])
        overrides = expand(
            flags.overrides,
            cuda=_has_cuda(flags.overrides),
            sweeps=flags.multirun,
            trains=program in TRAINING and flags.config_name is None and not flags.hydra_help,
        )
        notice = profile_notice(flags.overrides, overrides)
        _check_folder_key(overrides, sweeps=flags.multirun)
        if flags.config_dir is not None:
            check_config_dir(flags.config_dir, overrides)
            overrides.append(_search_path(flags.config_dir))
            beside(flags.config_dir)
        if not _is_unicode([*overrides, os.getcwd()]):
            # Hydra's files of the overrides must be UTF-8
            overrides.append("hydra.output_subdir=null")
        name = flags.config_name or program
        if flags.help:
            _show_help(program, inspect.getdoc(inspect.getmodule(main)) or "", name, overrides, dry_run is not None)
        elif flags.dry_run:
            _try(program, name, overrides, flags, dry_run, began)
        elif flags.multirun:
            sweep_dir = f"hydra.sweep.dir=outputs/${{name}}/sweep_${{now:%Y-%m-%d_%H-%M-%S}}_{os.getpid()}"
            _call_hydra(name, _Job(program, main, notice, held=False), [sweep_dir, *overrides], "--multirun")
        elif flags.shown:
            _call_hydra(name, _Job(program, main, notice, held=False), overrides, *flags.shown)
        else:
            _run_in_folder(program, name, overrides, _Job(program, main, notice, held=True))


def _try(
    program: str,
    name: str,
    overrides: Sequence[str],
    flags: argparse.Namespace,
    dry_run: DryRun | None,
    began: float,
) -> None:
    """Call `dry_run` with the configuration; ValueError where it cannot be tried."""
    if dry_run is None or flags.multirun or flags.shown:
        raise ValueError("--dry-run is for one run of rlmed.launch, rlmed.sft or rlmed.evaluate: drop it here")
    config, run_dir = _compose(program, name, overrides)
    folder, _ = _find_folder(config, run_dir, overrides)
    checkpoint = starting_point(folder, resume=config.resume is not None, trains=program in TRAINING)
    _hide_progress_bars()
    dry_run(config, checkpoint, began)


def _run_in_folder(program: str, name: str, overrides: Sequence[str], job: _Job) -> None:
    """Call the job in the run's folder, locked; remove it if it fails at once."""
    folder, parents = _choose_folder(program, name, overrides)
    # the libraries that save models accept only valid Unicode paths
    if program in TRAINING and not _is_unicode([str(folder)]):
        raise ValueError(
            f"{str(folder)!r}: no checkpoint can be written there, since the name cannot be decoded in this "
            f"terminal's locale: set LC_ALL=C.UTF-8, or choose another with {FOLDER_KEY}FOLDER"
        )
    new = not any(folder.iterdir())
    with (
        _removing([folder, *parents] if new else []),
        hold(folder, advice=f"wait until it has ended, or choose another folder with {FOLDER_KEY}FOLDER"),
    ):
        for path in (folder, folder / "checkpoints", folder / "evaluations"):
            if path.exists():
                check_writable(path)
            remove_leftovers(path, "*", held=True)
        _call_hydra(
            name,
            job,
            [*overrides, FOLDER_KEY + quoted(str(folder), commas=False)],
        )


@dataclass(frozen=True)
class _Job:
    """The job that Hydra calls."""

    program: str
    main: Callable[[RunConfig, Path], None]
    notice: str
    """Why the profile is `tiny` although none was given; "" if one was, or it is not."""
    held: bool
    """Whether this process already holds the folder; each job of a sweep has its own."""

    def __call__(self, composed: DictConfig) -> None:
        with _ending_errors(self.program):
            _hide_progress_bars()
            folder = Path(HydraConfig.get().runtime.output_dir)
            config = build_config(plain_config(composed))
            for handler in logging.getLogger().handlers:
                # created by Hydra in the locale's encoding
                if isinstance(handler, logging.FileHandler):
                    handler.stream.reconfigure(encoding="utf-8", errors=ERRORS)  # type: ignore[union-attr]
            if self.notice:
                data = (
                    "generated images" if config.data.source == "phantom" else config.data.train or "no training rows"
                )
                log.info("%s (here %s on %s)", self.notice, config.model.path, data)
            if self.held:
                self.main(config, folder)
                return
            _check_used(self.program)
            if config.resume is not None:
                raise ValueError(
                    f"resume={config.resume} is for one run, but --multirun starts new ones: drop one of them"
                )
            with hold(folder):
                self.main(config, folder)


def _hide_progress_bars() -> None:
    """Hide those of transformers: rlmed has its own."""
    with loading_libraries():
        from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()


def _has_cuda(overrides: Sequence[str]) -> bool:
    """Return whether there is a CUDA device; False without an experiment, whose profile it decides.

    Loading torch takes longer than everything else that `--help` or an error in the settings needs.
    """
    if not any(entry.lstrip("+").startswith("experiment=") for entry in overrides):
        return False
    with loading_libraries():
        import torch
    return torch.cuda.is_available()


@contextmanager
def _ending_errors(program: str) -> Iterator[None]:
    goes_on = "; resume=auto continues from the last checkpoint, if there is one" if program in TRAINING else ""
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
            from rlmed.cluster.advice import sparing_keys  # after the libraries' set-up, which it loads

            raise ValueError(f"{one_line(error)} ({sparing_keys(program)}){goes_on}") from error


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse overrides and Hydra's flags; `shown` lists flags that print instead of running.

    Raises:
        ValueError: for an unknown or unsupported flag.
    """
    parser = get_args_parser()
    parser.add_argument(DRY_RUN, action="store_true")
    check_spelling(arguments)

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}: --hydra-help lists the flags; settings are written key=value")

    parser.error = refuse  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(arguments)
    for flag in ("config_path", "experimental_rerun"):
        if vars(flags)[flag] is not None:
            raise ValueError(f"--{flag.replace('_', '-')} is not supported: --config-dir DIR adds your own YAML files")
    flags.multirun = flags.multirun or any(entry.upper() == "HYDRA.MODE=MULTIRUN" for entry in flags.overrides)
    shown = [f"--{flag.replace('_', '-')}" for flag in ("help", "hydra_help", "shell_completion") if vars(flags)[flag]]
    for flag in ("cfg", "package", "info"):
        if vars(flags)[flag] is not None:
            shown += [f"--{flag}", vars(flags)[flag]]
    flags.shown = [*shown, *(["--resolve"] if flags.resolve else [])]
    return flags


@contextmanager
def _removing(new: Sequence[Path]) -> Iterator[None]:
    """Remove a failed command's new run folder if it holds only settings and log.

    Args:
        new: the folder, if it is new, and its parents that are, from the inside.
    """
    try:
        yield
    except BaseException:
        if new and all(entry.name == ".hydra" or entry.suffix == ".log" for entry in new[0].iterdir()):
            shutil.rmtree(new[0], ignore_errors=True)
            with suppress(OSError):  # another run's folder is in it
                for parent in new[1:]:
                    parent.rmdir()
        raise


def _check_folder_key(overrides: Sequence[str], *, sweeps: bool) -> None:
    """Check that a folder setting matches the mode, single run or sweep.

    Raises:
        ValueError: for a folder that Hydra would ignore.
    """
    unread, why, instead = (
        (FOLDER_KEY, "is for one run, but --multirun starts several", "hydra.sweep.dir=FOLDER")
        if sweeps
        else ("hydra.sweep.", "is for --multirun", f"{FOLDER_KEY}FOLDER")
    )
    for entry in overrides:
        if entry.lstrip("+").startswith(unread):
            raise ValueError(f"{entry} {why}: set {instead}")


def _search_path(folder: str) -> str:
    """Return the override that adds `folder` to Hydra's search path."""
    return f"{SEARCH_KEY}[{quoted('file://' + str(Path(folder).absolute()), commas=False)}]"


def _is_unicode(texts: Sequence[str]) -> bool:
    """Return False if a file name from the system cannot be decoded in the locale's encoding."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for text in texts for character in text)


def _show_help(program: str, purpose: str, name: str, overrides: Sequence[str], tries: bool) -> None:
    with hydra.initialize_config_module("conf", version_base="1.3"):
        composed = hydra.compose(name, overrides=list(overrides))
        values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    sys.stdout.write(help_text(program, purpose, {str(key): value for key, value in values.items()}, tries=tries))


def _call_hydra(name: str, job: _Job, overrides: Sequence[str], *flags: str) -> None:
    sys.argv[1:] = [*overrides, *flags]
    hydra.main(version_base="1.3", config_path="pkg://conf", config_name=name)(job)()


def _compose(program: str, name: str, overrides: Sequence[str]) -> tuple[RunConfig, str]:
    """Return the configuration and run folder that the overrides describe.

    Raises:
        ConfigError: for an unknown key or invalid value.
    """
    with hydra.initialize_config_module("conf", version_base="1.3"):
        try:
            composed = hydra.compose(name, overrides=list(overrides), return_hydra_config=True)
        except UnicodeDecodeError as error:
            raise ValueError(explain(error)) from error
        HydraConfig.instance().set_config(composed)  # the folder's name may interpolate it
        run_dir = str(composed.hydra.run.dir)
        with open_dict(composed):
            del composed["hydra"]
        config = build_config(plain_config(composed))
        _check_used(program)
    return config, run_dir


def _choose_folder(program: str, name: str, overrides: Sequence[str]) -> tuple[Path, list[Path]]:
    """Return the run folder that the overrides describe, creating it if missing; and new parents.

    Raises:
        ConfigError: for an unknown key or invalid value.
        RecordError: if it cannot be created.
    """
    config, run_dir = _compose(program, name, overrides)
    folder, new = _find_folder(config, run_dir, overrides)
    parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        if new:
            return new_folder(folder), parents
        # check now: Hydra writes there before the program's own code runs
        starting_point(folder, resume=config.resume is not None, trains=program in TRAINING)
        folder.mkdir(parents=True, exist_ok=True)
        return folder, parents
    except OSError as error:
        raise refusal(folder, error, advice=f"try again, or choose another with {FOLDER_KEY}FOLDER") from error


def _find_folder(config: RunConfig, run_dir: str, overrides: Sequence[str]) -> tuple[Path, bool]:
    """Return the run folder, and whether it is to be a new one; create nothing.

    Says so where `resume=auto` finds nothing to resume.
    """
    if not run_dir:
        raise ValueError(f"{FOLDER_KEY} is empty: give a folder")
    folder = Path(run_dir).absolute()
    named = any(entry.lstrip("+").startswith(FOLDER_KEY) for entry in overrides)
    if config.resume is None:
        return folder, not named
    try:
        earlier = (folder if list_checkpoints(folder / "checkpoints") else None) if named else newest_run(folder)
    except OSError as error:
        raise refusal(folder, error, advice=f"try again, or choose another with {FOLDER_KEY}FOLDER") from error
    if earlier is None and config.resume == "auto":
        report_fresh_start(folder if named else folder.parent)
    return earlier or folder, not (named or earlier)
