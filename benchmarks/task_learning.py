"""Does the embedded model learn each task by RL? Scores before and after, over seeds.

The embedded model knows multiple choice alone. For each task it first imitates readers of other
generated studies (supervised fine-tuning): careful ones, who say what the image shows and answer,
and hasty ones, who give the answer to another question of the kind unseen. From this one model, RL
on the training questions with `reward=task` has to find out that it pays to look, once a seed. All
are evaluated on 300 further questions with the controls. Killed at any moment, the same command
goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
WARM_SEED = 1
"""Of the readings; another than that of the training and test questions."""


class Start(NamedTuple):
    """How a task's readings are imitated before RL."""

    rows: int
    epochs: int
    hasty: float = 0.6
    """Share of hasty readers."""


STARTS = {
    "open": Start(1200, 3),
    "grounding": Start(4800, 2),
    "labels": Start(2400, 3),
    "report": Start(1200, 3),
}
COMMON = ("profile=tiny", "data=jsonl", "data.max_prompt_tokens=384")
SFT = ("learner.lr=1e-3", "learner.lr_schedule=linear")
RL = ("reward=task", "learner.lr=1e-4")


def warm_start(folder: Path, task: str) -> Path:
    """Write the readings that a model first imitates, and return their file."""
    file = write_task_dataset(folder, WARM_SEED, (task,), train_rows=STARTS[task].rows, test_rows=1)[f"train_{task}"]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    answers: dict[str, list[str]] = {}
    for row in rows:
        answers.setdefault(row["kind"], []).append(str(answer_text(row["completion"])))
    for index, row in enumerate(rows):
        random = np.random.default_rng([WARM_SEED, index])
        if random.random() < STARTS[task].hasty:
            guess = answers[row["kind"]][int(random.integers(len(answers[row["kind"]])))]
            row["completion"] = written(f"{GUESS} {guess}.", guess)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return replace_text(folder / f"warm_{task}.jsonl", text)


def imitate(root: Path, task: str, overrides: Sequence[str]) -> Path:
    """Let the embedded model imitate the readings, unless it has; the folder of the run."""
    own = (f"data.train={warm_start(root / 'readings' / task, task)}", f"sft.epochs={STARTS[task].epochs}")
    return _trained(RunCommand("sft", 0, root / task, (*COMMON, *_tested(root, task), *own, *SFT, *overrides)))


def learn(root: Path, task: str, seed: int, start: Path, overrides: Sequence[str]) -> Path:
    """Train the last checkpoint of `start` by RL, unless that was done; the folder of the run."""
    files = (f"data.train={root / 'questions' / task / f'train_{task}.jsonl'}", *_tested(root, task))
    model = list_checkpoints(start / "checkpoints")[-1]
    return _trained(RunCommand("rl", seed, root / task, (*COMMON, *files, *RL, *overrides, f"model={model}")))


def _tested(root: Path, task: str) -> tuple[str, ...]:
    test = write_task_dataset(root / "questions" / task, 0, (task,))[f"test_{task}"]
    return (f"data.eval=[{test}]",)


def _trained(run: RunCommand) -> Path:
    if not run.done:
        report(f"{run.folder}")
        run.execute()
    return run.folder


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
    parser.add_argument("--steps", type=int, default=80, help="of RL")
    parser.add_argument("--runs", type=Path, default=Path("outputs/task_learning"), help="folder of all runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_intermixed_args()
    root, rl = arguments.runs, (f"steps={arguments.steps}", *arguments.overrides)
    results: dict[str, list[dict[str, Any]]] = {}
    for task in arguments.tasks:
        before = imitate(root, task, arguments.overrides)
        results[task] = [figures(before, learn(root, task, seed, before, rl)) for seed in arguments.seeds]
    report(markdown(results))
    payload = {
        "seeds": arguments.seeds,
        "starts": {task: STARTS[task]._asdict() for task in arguments.tasks},
        "sft": [*SFT, *arguments.overrides],
        "rl": [*RL, *rl],
        "tasks": results,
    }
    report(f"written: {write_result('task_learning', payload, arguments.out)}")


if __name__ == "__main__":
    main()
