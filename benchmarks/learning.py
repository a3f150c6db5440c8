"""Does the embedded experiment learn, and how does it compare with supervised fine-tuning on the same 600 rows?

For each seed it runs, one after the other,

    python -m rlmed.launch +experiment=medvqa_600 profile=embedded seed=S
    python -m rlmed.sft    +experiment=medvqa_600 profile=embedded seed=S

each in a folder of its own, and collects their evaluations. A run that has ended is not run again, and one that was
interrupted goes on from its last checkpoint, so this script may be killed and started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, report, write_result
from rlmed.evaluation_results import EvalSummary, FileSummary

METHODS = {"rl": "rlmed.launch", "sft": "rlmed.sft"}
"""Module that trains, by the name of the method."""
EXPERIMENT = ("+experiment=medvqa_600", "profile=embedded")
DONE_FILE = "benchmark_done.json"
COLUMNS = ("base", "sft", "rl")


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Example:
        Run("rl", 2, Path("outputs/learning"), ("steps=150",)).folder is outputs/learning/rl-seed2.
    """

    method: str
    seed: int
    root: Path
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.root / f"{self.method}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """What the command is given, apart from where it writes."""
        return ["-m", METHODS[self.method], *EXPERIMENT, f"seed={self.seed}", *self.overrides]

    @property
    def done(self) -> bool:
        """True when it has ended well.

        Raises:
            SystemExit: when its folder holds a run with other settings.
        """
        marker = self.folder / DONE_FILE
        if not marker.is_file():
            return False
        found = json.loads(marker.read_text(encoding="utf-8"))["arguments"]
        if found != self.arguments:
            raise SystemExit(
                f"{self.folder} holds a finished run of {' '.join(found)}, and {' '.join(self.arguments)} was asked for: "
                "remove that folder or choose another with --runs"
            )
        return True

    def execute(self) -> None:
        """Run it, or go on with it, to its end.

        Raises:
            SystemExit: when the command fails.
        """
        folder = self.folder.resolve()
        begun = any((folder / "checkpoints").glob("step-*"))
        where = f"resume={folder}" if begun else f"hydra.run.dir={folder}"
        report(f"{self.folder.name}: {'going on' if begun else 'starting'}")
        start = time.perf_counter()
        status = subprocess.run([sys.executable, *self.arguments, where], cwd=ROOT, check=False).returncode
        if status:
            raise SystemExit(
                f"{self.folder.name} ended with status {status}: its error is above; start this script again"
            )
        content = {"arguments": self.arguments, "resumed": begun, "seconds": round(time.perf_counter() - start, 1)}
        (folder / DONE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def evaluations(self) -> tuple[EvalSummary, EvalSummary]:
        """Before the first step and after the last.

        Raises:
            SystemExit: when there are not two.
        """
        folders = sorted((self.folder / "evaluations").glob("step-*"), key=lambda path: int(path.name[5:]))
        if len(folders) < 2 or int(folders[0].name[5:]) != 0:
            raise SystemExit(
                f"{self.folder} holds no evaluation of both ends: it needs eval.at_start=true eval.at_end=true"
            )
        return EvalSummary.read(folders[0]), EvalSummary.read(folders[-1])


def collect(runs: Sequence[Run]) -> dict[str, Any]:
    """All figures by file and column, one value a seed, in per cent.

    Returns:
        {file: {"rows", "chance", "prior", "columns": {"base" | "sft" | "rl": {figure: [value of each seed]}}}}. The base is the
        policy before the first step of RL, which does not depend on the seed.
    """
    files: dict[str, Any] = {}
    for run in runs:
        before, after = run.evaluations()
        if run.method == "rl":
            _add(files, "base", before)
        _add(files, run.method, after)
    return files


def _add(files: dict[str, Any], column: str, summary: EvalSummary) -> None:
    figures: dict[str, Callable[[FileSummary], float | None]] = {
        "accuracy": lambda file: file.accuracy.value,
        "format": lambda file: file.format_rate,
        "blank": lambda file: file.blank.value if file.blank else None,
        "shuffled": lambda file: file.shuffled.value if file.shuffled else None,
    }
    for file in summary.files:
        facts = {"rows": file.rows, "chance": _percent(file.chance), "prior": _percent(file.image_free_prior)}
        entry = files.setdefault(file.name, {**facts, "columns": {}})
        column_values = entry["columns"].setdefault(column, {name: [] for name in figures})
        for name, figure in figures.items():
            column_values[name].append(_percent(figure(file)))


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 2)


def mean_and_spread(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation over seeds; the mean alone where all seeds agree or there is one; – without values."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.1f}"
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{mean} ± {spread:.1f}" if spread else mean


def markdown(files: dict[str, Any], seeds: Sequence[int]) -> str:
    """The table: one line a file, in per cent."""
    head = [
        "file",
        "chance",
        "prior",
        "base",
        "SFT",
        "RL",
        "RL − base",
        "format base / SFT / RL",
        "RL blank",
        "RL shuffled",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, entry in files.items():
        columns = entry["columns"]
        accuracy = [mean_and_spread(columns[column]["accuracy"]) for column in COLUMNS]
        gains = [
            after - before for before, after in zip(columns["base"]["accuracy"], columns["rl"]["accuracy"], strict=True)
        ]
        formats = " / ".join(mean_and_spread(columns[column]["format"]) for column in COLUMNS)
        controls = [mean_and_spread(columns["rl"][control]) for control in ("blank", "shuffled")]
        gain = mean_and_spread(gains)
        gain = gain if gain.startswith("-") else f"+{gain}"
        facts = [mean_and_spread([entry["chance"]]), mean_and_spread([entry["prior"]])]
        lines.append("| " + " | ".join([name, *facts, *accuracy, gain, formats, *controls]) + " |")
    listed = ", ".join(map(str, seeds))
    lines.append("")
    lines.append(
        f"Greedy accuracy in %, mean ± standard deviation over seeds {listed}. prior: the option texts most often right in the "
        "training rows, no image. blank, shuffled: the trained policy over a grey image, over another question's image."
    )
    return "\n".join(lines)


def main() -> None:
    """Run what has not been run, print the table, write `learning.json` and `learning.md`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="RL steps (default: the experiment's)")
    parser.add_argument("--override", nargs="*", default=[], help="key=value for both commands, e.g. eval.limit=50")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "learning", help="where the run folders go")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result (default benchmarks/results)")
    arguments = parser.parse_args()
    steps = () if arguments.steps is None else (f"steps={arguments.steps}",)
    overrides = {"rl": (*steps, *arguments.override), "sft": tuple(arguments.override)}
    runs = [Run(method, seed, arguments.runs, overrides[method]) for seed in arguments.seeds for method in METHODS]
    for run in runs:
        if run.done:
            report(f"{run.folder.name}: done before")
        else:
            run.execute()
    files = collect(runs)
    table = markdown(files, arguments.seeds)
    seconds = {
        run.folder.name: json.loads((run.folder / DONE_FILE).read_text(encoding="utf-8"))["seconds"] for run in runs
    }
    commands = [f"python {' '.join(run.arguments)}" for run in runs]
    payload = {"seeds": arguments.seeds, "commands": commands, "seconds": seconds, "files": files}
    path = write_result("learning", payload, arguments.out)
    path.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    report(table)
    report(f"written to {path}")


if __name__ == "__main__":
    main()
