"""Measure the accuracy of any model folder, with controls: `python -m rlmed.evaluate model=DIR data=FILE.jsonl`.

`data=phantom` evaluates on the generated images, `data=[a.jsonl,b.jsonl]` on several files; `data.train=FILE` fits the
image-free prior; `compare_to=RUN/evaluations/step-000000` adds McNemar's test against an earlier evaluation of the same
rows; `eval.trust=true` adds calibration, pass@k, option order and reliance on the picture (docs/trust.md).
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rewards.conclusion import argued_option
from rlmed.cluster.engines import build_local_pool, build_policy, make_renderer, settle_model
from rlmed.commandline import run_command
from rlmed.core.config.composing import to_yaml
from rlmed.core.config.schema import RunConfig
from rlmed.core.files.atomic import replace_text
from rlmed.data.loading import load_run_data
from rlmed.data.stream import SEED_STRIDE
from rlmed.evaluation.reliability.questions import TrustSettings, measure_trust
from rlmed.evaluation.reliability.table import trust_table
from rlmed.evaluation.results import EvalSummary, check_comparable, compare, step_folder
from rlmed.evaluation.run import evaluate
from rlmed.evaluation.table import summary_table
from rlmed.models.loading import check_positions, model_folder
from rlmed.models.tiny.toy import TOY_NOTE, is_toy
from rlmed.recording.checkpoint import starting_point
from rlmed.recording.progress import Progress
from rlmed.recording.recorder import CONFIG_FILE, write_data, write_versions
from rlmed.report.page import write_report


def main(config: RunConfig, folder: Path) -> None:
    """Evaluate `config.model` on `config.data.eval`."""
    starting_point(folder, resume=False)  # never overwrite the evaluation of a training run
    if config.compare_to and not (Path(config.compare_to) / "rows.jsonl").is_file():
        raise ValueError(f"compare_to={config.compare_to} is not an evaluation: give a folder that contains rows.jsonl")
    renderer = make_renderer(config)
    check_positions(config, max_tokens=config.eval.max_tokens)
    data = load_run_data(config, renderer, training=False)
    files = data.eval_files(config.eval.limit)
    if config.compare_to:
        check_comparable(Path(config.compare_to), {file.name: file.examples for file in files})
    decided = settle_model(config)
    policy = build_policy(decided, model_folder(config.model.path))
    replace_text(folder / CONFIG_FILE, to_yaml(config))
    toy = is_toy(model_folder(config.model.path))
    write_versions(folder, decided.model, toy=toy)
    write_data(folder, data.files, data.leakage)
    pool, trust = build_local_pool(config, policy, renderer), None
    progress = Progress()
    with progress:
        summary = evaluate(
            files,
            pool=pool,
            renderer=renderer,
            train_examples=data.train_examples,
            max_tokens=config.eval.max_tokens,
            stop=config.rollout.stop,
            controls=config.eval.controls,
            folder=folder / "evaluations",
            step=0,
            model=config.model.path,
            on_progress=progress.answers,
        )
        if config.eval.trust:
            trust = measure_trust(
                files,
                step_folder(folder / "evaluations", 0),
                pool=pool,
                policy=policy,
                renderer=renderer,
                train_examples=data.train_examples,
                settings=TrustSettings(
                    samples=config.eval.samples,
                    max_tokens=config.eval.max_tokens,
                    stop=config.rollout.stop,
                    seed=config.seed * SEED_STRIDE,
                    token_budget=config.learner.token_budget,
                ),
                model=config.model.path,
                argued=argued_option,
                on_progress=progress.stage,
            )
    before, comparison = None, None
    if config.compare_to:
        before = EvalSummary.read(Path(config.compare_to))
        comparison = compare(Path(config.compare_to), step_folder(folder / "evaluations", 0))
    report = write_report(folder)
    console = Console()
    console.print(summary_table(before, summary, comparison))
    if trust is not None:
        console.print(trust_table(trust))
    if toy:
        console.print(f"note:   {TOY_NOTE}", soft_wrap=True, highlight=False)
    console.print(f"rows:   {step_folder(folder / 'evaluations', 0) / 'rows.jsonl'}", soft_wrap=True, markup=False)
    console.print(f"report: {report}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_command("evaluate", main)
