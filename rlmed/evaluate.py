"""`python -m rlmed.evaluate model=DIR data=FILE.jsonl`: accuracy with its controls, for any model folder.

`data=phantom` evaluates on the generated images, `data=[a.jsonl,b.jsonl]` on several files; `data.train=FILE` fits the
image-free prior; `before=RUN/evaluations/step-000000` adds McNemar's test against an earlier evaluation of the same rows;
`eval.trust=true` adds calibration, pass@k, option order and reliance on the picture (docs/trust.md).
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rewards.argument import argued_option
from rlmed.checkpoint import starting_point
from rlmed.commandline import run_command, to_yaml
from rlmed.core.config import RunConfig
from rlmed.core.files import replace_text
from rlmed.core.toy import TOY_NOTE, is_toy
from rlmed.engines import build_local_pool, build_policy, settle_model
from rlmed.evaluation import evaluate
from rlmed.evaluation_results import EvalSummary, check_comparable, compare, step_folder, summary_table
from rlmed.progress import Progress
from rlmed.recorder import CONFIG_FILE, write_data, write_versions
from rlmed.report import write_report
from rlmed.setup import check_positions, load_run_data, make_renderer, model_folder
from rlmed.stream import SEED_STRIDE
from rlmed.trust import TrustSettings, measure_trust
from rlmed.trust_table import trust_table


def main(config: RunConfig, folder: Path) -> None:
    """Evaluate `config.model` on `config.data.eval`."""
    starting_point(folder, resume=False)  # no evaluation takes the place of a training run's
    if config.before and not (Path(config.before) / "rows.jsonl").is_file():
        raise ValueError(f"before={config.before} is no evaluation: give a folder that holds rows.jsonl")
    renderer = make_renderer(config)
    check_positions(config, max_tokens=config.eval.max_tokens)
    data = load_run_data(config, renderer, training=False)
    files = data.eval_files(config.eval.limit)
    if config.before:
        check_comparable(Path(config.before), {file.name: file.examples for file in files})
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
    if config.before:
        before = EvalSummary.read(Path(config.before))
        comparison = compare(Path(config.before), step_folder(folder / "evaluations", 0))
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
