"""`python -m rlmed.reproduce +experiment=medvqa_600`: the paper's table, base against SFT against RL over several seeds.

It runs, one after the other and each in a folder of its own under `--out`,

    python -m rlmed.evaluate …           base: the model as it is
    python -m rlmed.sft      … seed=S    supervised fine-tuning on the same rows
    python -m rlmed.launch   … seed=S    reinforcement learning

with the same overrides, each with those that it reads, and writes `reproduce.md`, `.tex`, `.json` and `.html`. Killed at any
moment, the same command goes on: a run that has ended is not run again, and one that was interrupted continues from its last
checkpoint.
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

import torch
from rich.console import Console

from rlmed.commandline import LOST, unused_overrides
from rlmed.core.display import ending_errors, keep_display
from rlmed.core.files import replace_text
from rlmed.core.holding import hold
from rlmed.overrides import expand, quoted
from rlmed.reproduction import Reproduction, collect, write_reproduction

COMMANDS = {"base": "evaluate", "sft": "sft", "rl": "launch"}
"""Command by method, in the order in which they are run."""
PROGRAMS = {"base": "evaluate", "sft": "sft", "rl": "train"}
"""What of `conf/` each of them composes."""
OURS = ("seed", "resume", "hydra.run.dir", "eval.at_start", "eval.at_end", "eval.controls")
"""Keys that are set for each run here."""
DONE_FILE = "reproduce_done.json"
ATTEMPTS = 3
"""Times that a run which lost a process is started, before its loss is taken for a fault."""


@dataclass(frozen=True, slots=True)
class Run:
    """One command in one folder.

    Example:
        Run("rl", 2, Path("outputs/reproduce/medvqa_600"), ("+experiment=medvqa_600",)).folder.name is "rl-seed2".
    """

    method: str
    seed: int
    root: Path
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Its run folder; the base is evaluated greedily, so there is one for all seeds."""
        return self.root / ("base" if self.method == "base" else f"{self.method}-seed{self.seed}")

    @property
    def arguments(self) -> list[str]:
        """What python is given, apart from where the run writes."""
        # the base is evaluated once for all, and not again at the start of every run
        trained = [f"seed={self.seed}", "eval.at_start=false", "eval.at_end=true"] if self.method != "base" else []
        return ["-m", f"rlmed.{COMMANDS[self.method]}", *self.overrides, *trained, "eval.controls=true"]

    @property
    def done(self) -> bool:
        """True when it has ended well.

        Raises:
            ValueError: when its folder holds a run with other settings.
        """
        marker = self.folder / DONE_FILE
        if not marker.is_file():
            return False
        found = json.loads(marker.read_text(encoding="utf-8"))["arguments"]
        if found != self.arguments:
            raise ValueError(
                f"{self.folder} holds a finished run of `python {' '.join(found)}`, and `python "
                f"{' '.join(self.arguments)}` was asked for: choose another folder with --out, or remove that one"
            )
        return True

    def execute(self) -> None:
        """Run it, or go on with it, to its end.

        Raises:
            RuntimeError: when the command fails; its own error is on the terminal.
        """
        start = time.perf_counter()
        where = [f"hydra.run.dir={quoted(str(self.folder.resolve()), commas=False)}"]
        where += ["resume=auto"] if self.method != "base" else []
        for _ in range(ATTEMPTS):
            status = subprocess.run([sys.executable, *self.arguments, *where], check=False).returncode
            if status != LOST:  # a lost process: the same command goes on
                break
        if status:
            raise RuntimeError(
                f"{self.folder.name} ended with status {status}, its error is above; when the cause is mended, the same "
                "command goes on from here"
            )
        content = {"arguments": self.arguments, "seconds": round(time.perf_counter() - start, 1)}
        replace_text(self.folder / DONE_FILE, json.dumps(content, indent=1) + "\n")


def plan(root: Path, methods: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]) -> list[Run]:
    """The runs in their order: the base, then each method seed by seed.

    Raises:
        ValueError: for an override of a key that is set here or that none of the runs reads, or a seed or method given twice.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: a seed given twice counts the same run twice")
    if len(set(methods)) < len(methods):
        raise ValueError(f"--methods {' '.join(methods)}: a method given twice counts the same run twice")
    for entry in overrides:
        key = entry.partition("=")[0].lstrip("+~")
        if key == "eval.trust":
            raise ValueError(f"{entry} is for rlmed.evaluate alone: run it on the checkpoints that come of this")
        if "=" not in entry or key in OURS:
            what = "is set for each run" if key in OURS else "is no override of the form key=value"
            raise ValueError(f"{entry} {what}: give --seeds and --out, and only keys that all runs share")
    shares = _share_out(["base", *methods], overrides)
    base = [Run("base", 0, root, shares["base"])]
    return base + [Run(method, seed, root, shares[method]) for seed in seeds for method in methods]


def _share_out(methods: Sequence[str], overrides: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each method the overrides that its command reads.

    Raises:
        ValueError: for an override that none of them reads.
    """
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
    """`outputs/reproduce/NAME`, after the experiment where one is named."""
    named = [match[1] for entry in overrides if (match := re.fullmatch(r"\+?experiment=(\w+)", entry))]
    return Path("outputs/reproduce") / (named[-1] if named else "run")


def reproduce(runs: Sequence[Run], console: Console) -> Reproduction:
    """Run what has not been run, and read all that was found.

    Raises:
        RuntimeError: when a run fails.
        ValueError: when a folder holds something else.
    """
    finished = [run.done for run in runs]  # a folder with other settings is an error before anything is run
    for place, (run, done) in enumerate(zip(runs, finished, strict=True), start=1):
        console.print(f"[{place}/{len(runs)}] {run.folder.name}{': done before' if done else ''}", markup=False)
        if not done:
            run.execute()
    return collect([(run.method, run.seed, run.folder) for run in runs])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run everything, print the table, write it."""
    parser = argparse.ArgumentParser(
        prog="python -m rlmed.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="+experiment=NAME and key=value, as for rlmed.launch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=["sft", "rl"], default=["sft", "rl"])
    parser.add_argument("--out", type=Path, help="folder of all runs (default: outputs/reproduce/EXPERIMENT)")
    keep_display()
    # intermixed: --seeds may stand between overrides
    given = parser.parse_intermixed_args(arguments)
    console = Console()
    with ending_errors(RuntimeError, interrupted="interrupted; the same command goes on from here"):
        root = given.out or default_folder(given.overrides)
        runs = plan(root, given.methods, given.seeds, given.overrides)
        root.mkdir(parents=True, exist_ok=True)
        with hold(root, cure="wait until it has ended, or choose another folder with --out"):
            found = reproduce(runs, console)
            files = write_reproduction(root, found)
    console.print(found.table())
    for path in files:
        console.print(f"written: {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
