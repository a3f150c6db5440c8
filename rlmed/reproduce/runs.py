"""Reproduce the paper's table: base, SFT and RL over seeds.

The command is `python -m rlmed.reproduce +experiment=medvqa_600`.

It runs, one after the other and each in its own folder under `--out`,

    python -m rlmed.evaluate …           base: the untrained model
    python -m rlmed.sft      … seed=S    supervised fine-tuning on the same rows
    python -m rlmed.launch   … seed=S    reinforcement learning

passing each the overrides that it reads, and writes `reproduce.md`, `.tex`, `.json` and `.html`.
After an interruption, run the same command to continue: finished runs are not repeated, and an
interrupted one resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rlmed.core.config.composing import unused_overrides
from rlmed.core.config.overrides import expand, quoted
from rlmed.core.files.atomic import replace_text
from rlmed.core.files.exclusive import hold
from rlmed.core.process.display import ending_errors, keep_display
from rlmed.core.process.starting import loading_libraries
from rlmed.core.protocols import LOST
from rlmed.reproduce.table import Reproduction, collect, write_reproduction

COMMANDS = {"base": "evaluate", "sft": "sft", "rl": "launch"}
"""Command by method, in the order of execution."""
PROGRAMS = {"base": "evaluate", "sft": "sft", "rl": "train"}
"""Program of `conf/` by method."""
OURS = ("seed", "resume", "hydra.run.dir", "eval.at_start", "eval.at_end", "eval.controls")
"""Keys that this module sets for each run."""
DONE_FILE = "reproduce_done.json"
ATTEMPTS = 3
"""Most attempts at a run that loses a process."""


@dataclass(frozen=True, slots=True)
class RunCommand:
    """One command in one folder.

    Example:
        >>> RunCommand("rl", 2, Path("outputs/reproduce/medvqa_600"), ("+experiment=medvqa_600",)).folder.name
        'rl-seed2'
    """

    method: str
    seed: int
    root: Path
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Its run folder; the base is evaluated greedily, so one serves all seeds."""
        return self.root / ("base" if self.method == "base" else f"{self.method}-seed{self.seed}")

    @property
    def arguments(self) -> list[str]:
        """Arguments for python, except the run folder."""
        # the base is evaluated only once, not again at the start of every run
        trained = [f"seed={self.seed}", "eval.at_start=false", "eval.at_end=true"] if self.method != "base" else []
        return ["-m", f"rlmed.{COMMANDS[self.method]}", *self.overrides, *trained, "eval.controls=true"]

    @property
    def done(self) -> bool:
        """Whether it has finished successfully.

        Raises:
            ValueError: if its folder holds a run with other settings.
        """
        marker = self.folder / DONE_FILE
        if not marker.is_file():
            return False
        found = json.loads(marker.read_text(encoding="utf-8"))["arguments"]
        if found != self.arguments:
            raise ValueError(
                f"{self.folder} contains a finished run of `python {' '.join(found)}`, not of `python "
                f"{' '.join(self.arguments)}`: choose another folder with --out, or remove that one"
            )
        return True

    def execute(self) -> None:
        """Run it, or resume it, to its end.

        Raises:
            RuntimeError: if the command fails; its own error is on the terminal.
        """
        start = time.perf_counter()
        where = [f"hydra.run.dir={quoted(str(self.folder.resolve()), commas=False)}"]
        where += ["resume=auto"] if self.method != "base" else []
        for _ in range(ATTEMPTS):
            status = subprocess.run([sys.executable, *self.arguments, *where], check=False).returncode
            if status != LOST:  # after losing a process, the same command resumes
                break
        if status:
            raise RuntimeError(
                f"{self.folder.name} failed with status {status}, see its error above; fix the cause, then run the same "
                "command to continue"
            )
        content = {"arguments": self.arguments, "seconds": round(time.perf_counter() - start, 1)}
        replace_text(self.folder / DONE_FILE, json.dumps(content, indent=1) + "\n")


def plan(root: Path, methods: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]) -> list[RunCommand]:
    """Return the runs in order: the base, then every method for each seed.

    Raises:
        ValueError: for an override of a key in `OURS` or that no run reads, or a repeated seed or
            method.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: a repeated seed would count the same run twice")
    if len(set(methods)) < len(methods):
        raise ValueError(f"--methods {' '.join(methods)}: a repeated method would count the same run twice")
    for entry in overrides:
        key = entry.partition("=")[0].lstrip("+~")
        if "=" not in entry or key in OURS:
            what = "is set for each run" if key in OURS else "is not of the form key=value"
            raise ValueError(f"{entry} {what}: give --seeds and --out, and only keys that all runs share")
    shares = _share_out(["base", *methods], overrides)
    base = [RunCommand("base", 0, root, shares["base"])]
    return base + [RunCommand(method, seed, root, shares[method]) for seed in seeds for method in methods]


def _share_out(methods: Sequence[str], overrides: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return, for each method, the overrides that its command reads.

    Raises:
        ValueError: for an override that no command reads.
    """
    with loading_libraries():
        import torch
    cuda = torch.cuda.is_available()
    expanded = expand(overrides, cuda=cuda)
    unused = {
        method: {refusal.override: refusal.text for refusal in unused_overrides(PROGRAMS[method], expanded)}
        for method in methods
    }
    for entry, text in unused[methods[-1]].items():
        if all(entry in refused for refused in unused.values()):
            raise ValueError(text)
    return {
        method: tuple(entry for entry in overrides if not unused[method].keys() & set(expand([entry], cuda=cuda)))
        for method in methods
    }


def default_folder(overrides: Sequence[str]) -> Path:
    """Return `outputs/reproduce/NAME`, named after the experiment if there is one."""
    named = [match[1] for entry in overrides if (match := re.fullmatch(r"\+?experiment=(\w+)", entry))]
    return Path("outputs/reproduce") / (named[-1] if named else "run")


def reproduce(runs: Sequence[RunCommand], console: Console) -> Reproduction:
    """Execute unfinished runs and collect all results.

    Raises:
        RuntimeError: if a run fails.
        ValueError: if a folder holds a different run.
    """
    finished = [run.done for run in runs]  # check all folders' settings before anything runs
    for index, (run, done) in enumerate(zip(runs, finished, strict=True), start=1):
        console.print(f"[{index}/{len(runs)}] {run.folder.name}{': already done' if done else ''}", markup=False)
        if not done:
            run.execute()
    return collect([(run.method, run.seed, run.folder) for run in runs])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, then print and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m rlmed.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="+experiment=NAME and settings, as for rlmed.launch; each run gets those that its command reads",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="one SFT and one RL run each (0 1 2)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=["sft", "rl"],
        default=["sft", "rl"],
        help="what to compare with the untrained model (both)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of all runs and of the table (outputs/reproduce/EXPERIMENT)"
    )
    keep_display()
    # intermixed: --seeds may stand between overrides
    given = parser.parse_intermixed_args(arguments)
    console = Console()
    with ending_errors(RuntimeError, interrupted="interrupted; run the same command to continue"):
        root = given.out or default_folder(given.overrides)
        runs = plan(root, given.methods, given.seeds, given.overrides)
        root.mkdir(parents=True, exist_ok=True)
        with hold(root, advice="wait until it has ended, or choose another folder with --out"):
            found = reproduce(runs, console)
            files = write_reproduction(root, found)
    console.print(found.table())
    for path in files:
        console.print(f"written: {path}", soft_wrap=True)
