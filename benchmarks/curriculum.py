"""How many rollouts does a curriculum save? Accuracy over completions sampled, by way of choosing.

Groups whose rewards are all equal teach nothing. Dynamic sampling (DAPO, arXiv 2503.14476) samples
others in their place; selection by pass rate leaves out questions that had such groups lately. Both
are compared with neither, on the experiment, over seeds: held-out accuracy every few steps, and how
many completions were sampled until it first reached a level. The learning rate is low and the
questions are few, so that the way to the level takes several epochs: selection knows nothing in the
first. Killed at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, report, write_result
from rlmed.evaluation.results import SUMMARY_FILE, EvalSummary
from rlmed.reproduce.runs import RunCommand

WAYS: Mapping[str, tuple[str, ...]] = {
    "neither": ("algo=grpo",),
    "dynamic sampling": ("algo=grpo_dynamic",),
    "selection": ("algo=grpo", "data.selection.mode=pass_rate"),
    "both": ("algo=grpo_dynamic", "data.selection.mode=pass_rate"),
}
"""Overrides by name; the first is the one that the others are compared with."""
SLOW = ("learner.lr=2e-6", "data.limit=80", "steps=60", "eval.limit=100")


def read_run(folder: Path) -> dict[str, Any]:
    """A run's curve: completions sampled until each evaluation, and mean accuracy then.

    `taught` is the share of the sampled groups whose rewards differ; a reward may be missing.
    """
    sampled: dict[int, int] = {}
    groups = taught = 0
    with (folder / "rollouts.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            group = json.loads(line)
            rewards = [completion["reward"] for completion in group["completions"]]
            sampled[group["step"]] = sampled.get(group["step"], 0) + len(rewards)
            present = [reward for reward in rewards if reward is not None]
            groups, taught = groups + 1, taught + (bool(present) and max(present) - min(present) > 1e-6)
    curve = []
    for path in sorted((folder / "evaluations").glob(f"step-*/{SUMMARY_FILE}")):
        summary = EvalSummary.read(path.parent)
        before = sum(count for step, count in sampled.items() if step <= summary.step)
        curve.append({"step": summary.step, "completions": before, "accuracy": summary.mean_accuracy})
    return {"curve": curve, "taught": taught / groups}


def completions_to(curve: Sequence[Mapping[str, float]], level: float) -> float | None:
    """Completions sampled when the accuracy first was at the level, between evaluations by a line.

    None if it never was.
    """
    for earlier, later in itertools.pairwise(curve):
        if earlier["accuracy"] >= level:
            return earlier["completions"]
        if later["accuracy"] >= level:
            share = (level - earlier["accuracy"]) / (later["accuracy"] - earlier["accuracy"])
            return earlier["completions"] + share * (later["completions"] - earlier["completions"])
    return None


def compare(runs: Mapping[str, Sequence[Mapping[str, Any]]], level: float) -> dict[str, Any]:
    """For each way the completions to the level, by seed, and what else its runs have in common."""
    curves = {name: [run["curve"] for run in of_name] for name, of_name in runs.items()}
    return {
        "level": level,
        "completions": {name: [completions_to(curve, level) for curve in of_name] for name, of_name in curves.items()},
        "sampled": {name: [curve[-1]["completions"] for curve in of_name] for name, of_name in curves.items()},
        "final": {name: [curve[-1]["accuracy"] for curve in of_name] for name, of_name in curves.items()},
        "taught": {name: [run["taught"] for run in of_name] for name, of_name in runs.items()},
    }


def markdown(compared: Mapping[str, Any]) -> str:
    """One line for each way."""
    lines = [
        f"| way | groups that teach, % | completions to {100 * compared['level']:.0f} %, by seed | mean | in all | final, % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, counts in compared["completions"].items():
        shown = ", ".join("not reached" if count is None else f"{count:.0f}" for count in counts)
        average = "" if None in counts else f"{statistics.fmean(counts):.0f}"
        taught, final, sampled = (statistics.fmean(compared[key][name]) for key in ("taught", "final", "sampled"))
        lines.append(f"| {name} | {100 * taught:.0f} | {shown} | {average} | {sampled:.0f} | {100 * final:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Train what has not been trained, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.curriculum",
    )
    parser.add_argument("overrides", nargs="*", default=[], help="key=value, for all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=int, default=3, help="steps between evaluations")
    parser.add_argument("--level", type=float, default=0.75, help="mean accuracy to be reached")
    parser.add_argument("--runs", type=Path, default=Path("outputs/curriculum"), help="folder of all runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_intermixed_args()
    overrides = ["+experiment=medvqa_600", f"eval.every={arguments.every}", *SLOW, *arguments.overrides]
    plan = {
        name: [RunCommand("rl", seed, arguments.runs / str(place), (*overrides, *own)) for seed in arguments.seeds]
        for place, (name, own) in enumerate(WAYS.items())
    }
    for of_one_seed in zip(*plan.values(), strict=True):
        for name, run in zip(plan, of_one_seed, strict=True):
            if not run.done:
                report(f"{name}, seed {run.seed}: {run.folder}")
                run.execute()
    runs = {name: [read_run(run.folder) for run in of_name] for name, of_name in plan.items()}
    compared = compare(runs, arguments.level)
    report(markdown(compared))
    payload = {"seeds": arguments.seeds, "overrides": overrides, "compared": compared, "runs": runs}
    report(f"written: {write_result('curriculum', payload, arguments.out)}")


if __name__ == "__main__":
    main()
