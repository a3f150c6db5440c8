"""Does the embedded model learn each task by RL? Scores before and after, over seeds.

The embedded model knows multiple choice alone. For each task it first imitates readers of other
generated studies (supervised fine-tuning): careful ones, who say what the image shows and answer,
and hasty ones, who give the answer to another question of the kind unseen. Then RL on the training
questions with `reward=task` has to find out that it pays to look. Both are evaluated on 300 further
questions with the controls. Killed at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, report, write_result
from rlmed.core.files.atomic import replace_text
from rlmed.core.parsing import answer_text
from rlmed.data.phantom.corpus import GUESS
from rlmed.data.phantom.task_texts import written
from rlmed.data.phantom.tasks import write_task_dataset
from rlmed.evaluation.results import EvalSummary, compare, last_evaluation
from rlmed.recording.checkpoint import list_checkpoints
from rlmed.reproduce.runs import RunCommand

TASKS = ("open", "grounding", "labels", "report")
WARM_ROWS, WARM_SEED = 1200, 1
"""Readings to imitate; the seed is another than that of the training and test questions."""
HASTY = {"open": 0.6, "report": 0.6, "grounding": 0.3, "labels": 0.3}
"""Share of hasty readers: boxes and labels take more careful ones to be written at all."""
EPOCHS = {"open": 3, "report": 3, "grounding": 5, "labels": 5}
SFT = ("learner.lr=1e-3", "learner.lr_schedule=linear")
RL = ("reward=task", "learner.lr=1e-4")


def warm_start(folder: Path, task: str) -> Path:
    """Write the readings that a model first imitates, and return their file."""
    file = write_task_dataset(folder, WARM_SEED, (task,), train_rows=WARM_ROWS, test_rows=1)[f"train_{task}"]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["kind"], []).append(str(answer_text(row["completion"])))
    for index, row in enumerate(rows):
        random = np.random.default_rng([WARM_SEED, index])
        if random.random() < HASTY[task]:
            guess = answers[row["kind"]][int(random.integers(len(answers[row["kind"]])))]
            row["completion"] = written(f"{GUESS} {guess}.", guess)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return replace_text(folder / f"warm_{task}.jsonl", text)


def runs_of(root: Path, task: str, seed: int, overrides: Sequence[str], rl: Sequence[str]) -> Sequence[Path]:
    """Train what has not been trained; the folders of fine-tuning and of RL."""
    readings = warm_start(root / "readings" / task, task)
    test = write_task_dataset(root / "questions" / task, 0, (task,))[f"test_{task}"]
    of_readings = ("data=jsonl", f"data.train={readings}", f"data.eval=[{test}]", "data.max_prompt_tokens=384")
    sft = RunCommand(
        "sft", seed, root / task, ("profile=tiny", *of_readings, *overrides, *SFT, f"sft.epochs={EPOCHS[task]}")
    )
    _execute(sft)
    model = list_checkpoints(sft.folder / "checkpoints")[-1]
    files = (f"data.train={test.parent / f'train_{task}.jsonl'}", *of_readings[2:])
    learnt = RunCommand(
        "rl", seed, root / task, ("profile=tiny", "data=jsonl", *files, *overrides, *RL, *rl, f"model={model}")
    )
    _execute(learnt)
    return sft.folder, learnt.folder


def _execute(run: RunCommand) -> None:
    if not run.done:
        report(f"{run.folder}")
        run.execute()


def figures(before: Path, after: Path) -> dict[str, Any]:
    """Main score of one seed: both sides with intervals, p-value; controls and baselines."""
    sides = [last_evaluation(folder) for folder in (before, after)]
    ((tested,),) = [file["scores"].values() for file in compare(*sides)["files"].values()]
    (first,), (second,) = (EvalSummary.read(side).files[0].tasks for side in sides)
    main = second.main
    estimates = {"before": first.scores[main], "after": second.scores[main]}
    estimates |= {name: scores[main] for name, scores in second.controls.items()}
    return {
        "score": main,
        **{name: [one.value, one.low, one.high] for name, one in estimates.items()},
        "over_file": {name: [first.over_file[name].value, one.value] for name, one in second.over_file.items()},
        "chance": second.chance[main],
        "prior": second.prior[main] if second.prior else second.own_prior[main],
        "p_value": tested["p_value"],
    }


def markdown(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line for each task: means over the seeds in per cent, and the change of each seed."""
    columns = ("before", "after", "blank", "shuffled", "prior", "chance")
    lines = [
        "| task | score | " + " | ".join(columns) + " | change, by seed |",
        "| " + " | ".join(["---"] * (len(columns) + 3)) + " |",
    ]
    for task, seeds in results.items():
        cells = [f"{100 * statistics.fmean(_value(seed[name]) for seed in seeds):.1f}" for name in columns]
        changes = ", ".join(f"{100 * (seed['after'][0] - seed['before'][0]):+.1f}" for seed in seeds)
        lines.append(f"| {task} | {seeds[0]['score']} | {' | '.join(cells)} | {changes} |")
    return "\n".join(lines)


def _value(figure: Any) -> float:
    return float(figure[0] if isinstance(figure, list) else figure)


def main() -> None:
    """Train what has not been trained, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.task_learning",
    )
    parser.add_argument("overrides", nargs="*", default=[], help="key=value, for all runs")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="of RL")
    parser.add_argument("--runs", type=Path, default=Path("outputs/task_learning"), help="folder of all runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_intermixed_args()
    rl = (f"steps={arguments.steps}",)
    results: dict[str, list[dict[str, Any]]] = {task: [] for task in arguments.tasks}
    for seed in arguments.seeds:
        for task in arguments.tasks:
            folders = runs_of(arguments.runs, task, seed, tuple(arguments.overrides), rl)
            results[task].append(figures(*folders))
    report(markdown(results))
    payload = {
        "seeds": arguments.seeds,
        "sft": SFT,
        "hasty": HASTY,
        "epochs": EPOCHS,
        "rl": [*RL, *rl, *arguments.overrides],
        "tasks": results,
    }
    report(f"written: {write_result('task_learning', payload, arguments.out)}")


if __name__ == "__main__":
    main()
