"""Does a small language model learn the same as with TRL's GRPOTrainer, and in what time?

Both sides start from the same model and see the same rows in the same order, with the same rewards
and settings, in float32. They take their steps in turn in one run, TRL in a process of its own
(`benchmarks/trl_text.py`); each seed is such a run. The rewards of each step, the curves with
their noise, a test of whether they differ, and the time to the same reward are told. At the end of
a run both models answer the test rows greedily. Killed at any moment, the same command goes on
with the next seed that is not done.

    python -m benchmarks.text_questions data/terms
    python -m benchmarks.trl_curves --model MODEL --questions data/terms --trl-python PYTHON
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import RESULTS, ROOT, report, write_result
from benchmarks.curves import compare, draw
from benchmarks.grpo_step import TrlTrainer
from rlmed.controller import StepResult, train
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.core.files.atomic import replace_text
from rlmed.core.process.threads import usable_cores
from rlmed.data.curriculum import Curriculum
from rlmed.evaluation.results import EvalSummary, last_evaluation
from rlmed.run import Run

REWARDS = ("format", "choice")
KEPT = ("prompts", "group_size", "max_tokens", "steps", "seeds", "lr", "kl_coef")
"""Arguments that the result keeps."""
TRAINED = ("model", "questions", "threads", "prompts", "group_size", "max_tokens", "steps", "lr", "kl_coef")
"""Arguments that a seed's result depends on."""


def settings(arguments: argparse.Namespace, seed: int) -> list[str]:
    """Overrides of our side's run."""
    return [
        "data=jsonl",
        f"data.train={arguments.questions / 'train.jsonl'}",
        "data.max_prompt_tokens=256",
        f"model.path={arguments.model}",
        "prompt=short",
        "algo=grpo",
        f"algo.group_size={arguments.group_size}",
        f"algo.groups_per_step={arguments.prompts}",
        f"algo.loss.kl_coef={arguments.kl_coef}",
        f"rollout.max_tokens={arguments.max_tokens}",
        f"learner.lr={arguments.lr}",
        "learner.lr_schedule=constant",
        f"steps={arguments.steps}",
        f"seed={seed}",
    ]


class OurTrainer:
    """A run as `python -m rlmed.launch` wires it, one step at a time."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Load everything."""
        self._run = Run(config, folder)
        self._result: StepResult | None = None
        self._done = 0

    def prompts(self) -> list[list[int]]:
        """Token ids of the prompts, in the order of the training."""
        count = self._run.config.steps * self._run.config.algo.groups_per_step
        return [self._run.stream.request(index).prompt.token_ids.tolist() for index in range(count)]

    def end_token_ids(self) -> list[int]:
        """Tokens that end a completion."""
        return sorted(self._run.cluster.learner.policy.end_token_ids)  # type: ignore[attr-defined]

    def step(self) -> dict[str, float]:
        """Take a step; its seconds, rewards and length."""
        wall, cpu = time.perf_counter(), time.process_time()
        train(
            self._run.cluster.pool,
            self._run.cluster.learner,
            self._run.buffer,
            self._run.advantages,
            done=self._done,
            steps=self._done + 1,
            tracer=self._run.tracer,
            after_step=self._keep,
        )
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        assert self._result is not None
        self._done = self._result.step
        metrics = self._result.metrics
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "length": metrics["completion/length"],
            "reward": metrics["reward/mean"],
            "kl": metrics["kl"],
            **{name: metrics[f"reward/{name}"] for name in REWARDS},
        }

    def save(self, folder: Path) -> None:
        """Write the model and end the run."""
        folder.mkdir(parents=True)
        self._run.renderer.save(folder)
        self._run.cluster.learner.save(folder)()
        self._run.cluster.close()

    def _keep(self, result: StepResult) -> None:
        self._result = result


def ordered_rows(questions: Path, config: RunConfig, target: Path) -> None:
    """Write the rows of `questions` in the order in which our side draws them."""
    lines = [line for line in questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    curriculum = Curriculum([json.loads(line).get("modality", "") for line in lines], config.seed)
    count = config.steps * config.algo.groups_per_step
    drawn = [json.loads(lines[curriculum.visit(index).example]) for index in range(count)]
    rows = [json.dumps({**row, "id": f"{place}"}) + "\n" for place, row in enumerate(drawn)]
    target.write_text("".join(rows), encoding="utf-8")


def trl_setting(arguments: argparse.Namespace, config: RunConfig, folder: Path, ends: Sequence[int]) -> dict[str, Any]:
    """What `benchmarks/trl_text.py` is told."""
    learner, loss = config.learner, config.algo.loss
    return {
        "model": str(arguments.model.resolve()),
        "questions": str((folder / "rows.jsonl").resolve()),
        "out": str((folder / "trl").resolve()),
        "template": config.prompt.template,
        "rewards": REWARDS,
        "seed": config.seed,
        "prompts": config.algo.groups_per_step,
        "group_size": config.algo.group_size,
        "max_tokens": config.rollout.max_tokens,
        "steps": config.steps,
        "threads": arguments.threads,
        "kl_coef": loss.kl_coef,
        "clip_ratio": loss.clip_ratio_low,
        "learning_rate": learner.lr,
        "betas": list(learner.betas),
        "weight_decay": learner.weight_decay,
        "max_grad_norm": learner.max_grad_norm,
        "end_token_ids": list(ends),
    }


def accuracy(model: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Share of right greedy answers to the test rows, and of answers in the format."""
    overrides = [
        f"model.path={model}",
        "data=jsonl",
        f"data.eval=[{arguments.questions / 'test.jsonl'}]",
        "prompt=short",
        f"eval.max_tokens={arguments.max_tokens}",
        "eval.controls=false",
        f"hydra.run.dir={folder}",
    ]
    subprocess.run(
        [sys.executable, "-m", "rlmed.evaluate", *overrides], check=True, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    (file,) = EvalSummary.read(last_evaluation(folder)).files
    return {"accuracy": file.accuracy.value, "format": file.format_rate}


def run_seed(arguments: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Train both with one seed, in turn; the steps and the accuracy of each."""
    folder.mkdir(parents=True)
    config = compose_config("train", settings(arguments, seed))
    ordered_rows(arguments.questions / "train.jsonl", config, folder / "rows.jsonl")
    ours = OurTrainer(config, folder / "run")
    setting = trl_setting(arguments, config, folder, ours.end_token_ids())
    theirs = TrlTrainer(arguments.trl_python, "benchmarks.trl_text", setting)
    try:
        if theirs.facts.pop("prompts") != ours.prompts():
            raise RuntimeError("the two sides tokenize the prompts differently, or in another order")
        steps: dict[str, list[dict[str, float]]] = {"rlmed": [], "trl": []}
        for step in range(1, config.steps + 1):
            for name, take in (("rlmed", ours.step), ("trl", theirs.step)):
                steps[name].append({key: value for key, value in take().items() if key != "benchmark"})
            (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
            told = (f"{name} {rows[-1]['reward']:.2f} in {rows[-1]['seconds']:.1f} s" for name, rows in steps.items())
            report(f"seed {seed}, step {step}: reward {', '.join(told)}")
        theirs.finish()
    finally:
        theirs.close()
    ours.save(folder / "rlmed")
    del ours
    held_out = {name: accuracy(folder / name, arguments, folder / f"evaluation_{name}") for name in steps}
    for name in steps:
        shutil.rmtree(folder / name)
    return {"seed": seed, "steps": steps, "test": held_out, "trl": theirs.facts}


def finished(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The result of each seed, trained now if it was not before.

    Raises:
        SystemExit: if a seed was trained with other settings.
    """
    results = []
    setting = json.loads(json.dumps({name: vars(arguments)[name] for name in TRAINED}, default=str))
    for seed in arguments.seeds:
        folder = arguments.runs / f"seed_{seed}"
        path = folder / "result.json"
        if not path.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            replace_text(path, json.dumps({"setting": setting, **run_seed(arguments, seed, folder)}))
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.pop("setting") != setting:
            raise SystemExit(f"{path} has other settings: name another folder with --runs, or remove {folder}")
        results.append(result)
    return results


def summary_line(name: str, figures: Mapping[str, Any]) -> str:
    """One side in words."""
    tested = ", ".join(f"{100 * value:.1f}" for value in figures["test_accuracy"])
    reached, final = figures["to_level"], figures["final"]
    noise = f" ± {statistics.stdev(final):.3f}" if len(final) > 1 else ""
    return (
        f"{name}: final reward {statistics.fmean(final):.3f}{noise}, test "
        f"{tested} %, to the level in steps {reached['steps']}, s {reached['seconds']}, CPU s {reached['cpu_seconds']}"
    )


def main() -> None:
    """Train what is not trained, compare, draw, and write `trl_curves.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trl_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="a language model after its cold start")
    parser.add_argument("--questions", type=Path, required=True, help="folder that text_questions has written")
    parser.add_argument("--trl-python", default=sys.executable, help="a Python with trl (default: this one)")
    parser.add_argument("--runs", type=Path, default=Path("outputs/trl_curves"), help="folder of all runs")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/figures/trl_curves.png")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=28)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--kl-coef", type=float, default=0.04)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    results = finished(arguments)
    compared = compare(results)
    draw(results, arguments.figure)
    for name in ("rlmed", "trl"):
        report(summary_line(name, compared[name]))
    if "difference" in compared:
        report(f"final reward, {compared['difference']}; mean reward of all steps, {compared['difference_of_means']}")
    setting = {key: value for key, value in vars(arguments).items() if key in KEPT}
    payload = {"setting": setting, "compared": compared, "runs": results}
    report(f"written to {write_result('trl_curves', payload, arguments.out)} and {arguments.figure}")


if __name__ == "__main__":
    main()
