"""What does each reward do to accuracy, controls, reasoning length and reasoning-answer agreement?

The experiment is trained once for each set of rewards and each seed, in a folder of its own under
`--runs`; what is told is read from the greedy answers at the end of each run. Killed at any moment,
the same command goes on.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, report, write_result
from rewards.conclusion import argued_option
from rlmed.core.parsing import reasoning_text, words
from rlmed.evaluation.reliability.figures import reasoning_agreement
from rlmed.evaluation.results import EvalSummary, compare, last_evaluation, read_rows
from rlmed.reproduce.runs import RunCommand

REWARDS: Mapping[str, tuple[str, ...]] = {
    "format + choice": (),
    "+ likelihood gain": ("+reward.weights.likelihood_gain=0.5",),
    "+ reasoning_consistency": ("+reward.weights.reasoning_consistency=0.25",),
    "+ brevity, repetition": ("+reward.weights.brevity=0.1", "+reward.weights.repetition=0.1"),
    "reasoning (all of these)": ("reward=reasoning",),
    "unlabelled": ("reward=unlabelled",),
}
"""Overrides by name; the first is the one that the others are compared with."""

CONTROLS = ("blank", "shuffled", "reordered")
"""Means over the files stand beside the accuracy."""


def read_run(folder: Path) -> dict[str, float]:
    """The figures of a run's last evaluation; shares in [0, 1], `words` a mean length.

    `different` is the share of different texts among the reasonings, `argues` that of reasonings
    which argue for an option, `agrees` that of these whose option is answered.
    """
    evaluation = last_evaluation(folder)
    summary = EvalSummary.read(evaluation)
    rows = [row for row in read_rows(evaluation) if row.control == "none"]
    reasonings = [reasoning_text(row.completion) or "" for row in rows]
    agreement = reasoning_agreement(rows, argued_option)
    controls = {name: [getattr(file, name) for file in summary.files] for name in CONTROLS}
    return {
        **{file.name: file.accuracy.value for file in summary.files},
        "mean": summary.mean_accuracy,
        **{name: _mean(file.value for file in files) for name, files in controls.items() if all(files)},
        "prior": _mean(file.image_free_prior for file in summary.files),
        "chance": _mean(file.chance for file in summary.files),
        "format": _mean(file.format_rate for file in summary.files),
        "words": _mean(len(words(text)) for text in reasonings),
        "different": len(set(reasonings)) / len(reasonings),
        "argues": agreement.argued.value,
        "agrees": agreement.agrees.value if agreement.agrees else 0.0,
    }


def compare_seeds(folders: Sequence[Path], others: Sequence[Path]) -> dict[str, float]:
    """The largest p-value over the seeds of McNemar's test, by file."""
    pairs = zip(map(last_evaluation, folders), map(last_evaluation, others), strict=True)
    tests = [compare(first, second)["files"] for first, second in pairs]
    return {name: max(test[name]["p_value"] for test in tests) for name in tests[0]}


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def cell(values: Sequence[float], *, percent: bool) -> str:
    """Mean and sample standard deviation over the seeds."""
    scale = 100 if percent else 1
    spread = f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{scale * _mean(values):.1f}{spread}"


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each set of rewards."""
    columns = list(next(iter(results.values()))["figures"][0])
    lines = [["rewards", *columns], ["---"] * (len(columns) + 1)]
    for name, result in results.items():
        by_seed = result["figures"]
        cells = [cell([figures[column] for figures in by_seed], percent=column != "words") for column in columns]
        lines.append([name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plan_runs(
    runs: Path, seeds: Sequence[int], overrides: Sequence[str], rewards: Sequence[str]
) -> dict[str, list[RunCommand]]:
    """The runs of each of the `rewards` by name; the first of `REWARDS` is always among them."""
    return {
        name: [RunCommand("rl", seed, runs / str(place), (*overrides, *own)) for seed in seeds]
        for place, (name, own) in enumerate(REWARDS.items())
        if place == 0 or name in rewards
    }


def measure(plan: Mapping[str, Sequence[RunCommand]]) -> dict[str, dict[str, Any]]:
    """Train what has not been trained, seed by seed, and read all of it, by name of the rewards."""
    for of_one_seed in zip(*plan.values(), strict=True):
        for name, run in zip(plan, of_one_seed, strict=True):
            if not run.done:
                report(f"{name}, seed {run.seed}: {run.folder}")
                run.execute()
    folders = {name: [run.folder for run in of_name] for name, of_name in plan.items()}
    baseline = next(iter(folders.values()))
    return {
        name: {
            "overrides": REWARDS[name],
            "figures": [read_run(folder) for folder in of_name],
            "p_values": {} if of_name is baseline else compare_seeds(baseline, of_name),
        }
        for name, of_name in folders.items()
    }


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.reward_ablation",
    )
    parser.add_argument("overrides", nargs="*", default=[], help="key=value, for all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS), help="all by default")
    parser.add_argument("--name", default="reward_ablation", help="of the result file")
    parser.add_argument("--runs", type=Path, default=Path("outputs/reward_ablation"), help="folder of all runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_intermixed_args()
    overrides = ["+experiment=medvqa_600", *arguments.overrides]
    results = measure(plan_runs(arguments.runs, arguments.seeds, overrides, arguments.rewards))
    report(markdown(results))
    payload = {"seeds": arguments.seeds, "overrides": overrides, "rewards": results}
    report(f"written: {write_result(arguments.name, payload, arguments.out)}")


if __name__ == "__main__":
    main()
