"""One evaluation, for `rlmed.evaluate` and `rlmed.reliability`: load, measure, show."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rewards.conclusion import argued_option
from rlmed.cluster.commands import BuildSampling, Sampling, build_local_sampling, build_sampling
from rlmed.cluster.engines import make_renderer
from rlmed.cluster.requirements import check_device, check_machine
from rlmed.core.config.composing import to_yaml
from rlmed.core.config.schema import RunConfig
from rlmed.core.types import Example
from rlmed.data.loading import CheckRows, load_run_data
from rlmed.data.stream import SEED_STRIDE
from rlmed.evaluation.faithfulness import read_faithfulness
from rlmed.evaluation.faithfulness_table import faithfulness_table
from rlmed.evaluation.kits.predictions import check_kits, predictions_table, write_predictions
from rlmed.evaluation.kits.rule_scores import FOLDER
from rlmed.evaluation.reliability.questions import ReliabilitySettings, measure_reliability
from rlmed.evaluation.reliability.table import reliability_table
from rlmed.evaluation.report_metrics import check_report_metrics
from rlmed.evaluation.results import ROWS_FILE, check_comparable, step_folder
from rlmed.evaluation.run import Evaluator
from rlmed.models.loading import check_positions, model_folder
from rlmed.models.tiny.toy import is_toy, toy_note
from rlmed.recording.checkpoint import starting_point
from rlmed.recording.inputs import write_inputs
from rlmed.recording.progress import Progress
from rlmed.report.terminal import WIDTH, show_results


def evaluate(config: RunConfig, folder: Path) -> None:
    """Evaluate `config.model` on `config.data.eval`."""
    check_machine(config, learns=False)
    progress = Progress()
    evaluator, sampling = open_evaluation(config, folder, progress)
    with sampling.resources, progress:
        evaluator.evaluate(step=0, controls=config.eval.controls)
    show_evaluation(config, folder)


def evaluate_reliability(config: RunConfig, folder: Path) -> None:
    """Evaluate `config.model` on `config.data.eval`, then ask the same questions again."""
    check_device(config.model)
    progress = Progress()
    evaluator, sampling = open_evaluation(
        config, folder, progress, build_local_sampling, lambda rows: _check_letters(rows[: config.eval.limit])
    )
    assert sampling.policy is not None, "it runs in one process"
    settings = ReliabilitySettings(
        samples=config.reliability.samples,
        seed=config.seed * SEED_STRIDE,
        token_budget=config.learner.token_budget,
    )
    with sampling.resources, progress:
        evaluator.evaluate(step=0, controls=config.eval.controls)
        measured = measure_reliability(evaluator, 0, sampling.policy, settings, argued_option, progress.stage)
    show_evaluation(config, folder, reliability_table(measured))


def _check_letters(rows: Sequence[Example]) -> None:
    if others := sorted({row.task for row in rows if not row.is_choice}):
        raise ValueError(
            f"rlmed.reliability asks for the probabilities of letters, and data.eval has other tasks ({', '.join(others)}): "
            "give files of multiple choice, or use rlmed.evaluate"
        )


def open_evaluation(
    config: RunConfig,
    folder: Path,
    progress: Progress,
    build: BuildSampling = build_sampling,
    check: CheckRows | None = None,
) -> tuple[Evaluator, Sampling]:
    """Load model and data, write the first files, return the evaluator and its sampler.

    Raises:
        ValueError: for unusable data or model, a folder that holds a training run, or another
            evaluation of other rows.
    """
    starting_point(folder, resume=False, trains=False)  # never overwrite the evaluation of a training run
    before = _compared(config)
    if before and not (before / ROWS_FILE).is_file():
        raise ValueError(f"compare_to={before} is not an evaluation: give a folder that contains {ROWS_FILE}")
    renderer = make_renderer(config.model, config.data, config.prompt)
    check_positions(config.model, config.data, max_tokens=config.eval.max_tokens)
    data = load_run_data(config.data, config.prompt, renderer, training=False, check=check)
    if before:
        check_comparable(before, {file.name: file.examples for file in data.eval_files(config.eval.limit)})
    check_kits(config.eval.predictions, data.eval_files(config.eval.limit))
    check_report_metrics(config.eval, data)
    # the longest completion is an evaluation's
    rollout = dataclasses.replace(config.rollout, max_tokens=config.eval.max_tokens)
    sampling = build(dataclasses.replace(config, data=data.settle_images(config.data), rollout=rollout), renderer)
    toy = is_toy(model_folder(config.model.path))
    write_inputs(folder, to_yaml(config), sampling.model, data.files, data.leakage, toy=toy)
    evaluator = Evaluator.of_run(
        config.eval,
        folder,
        data,
        sampling.pool,
        renderer,
        stop=config.rollout.stop,
        model=config.model.path,
        on_progress=progress.answers,
    )
    return evaluator, sampling


def show_evaluation(config: RunConfig, folder: Path, *more: Table) -> None:
    """Write predictions and the report; print accuracy, faithfulness, further tables, the paths."""
    evaluation = step_folder(folder / "evaluations", 0)
    faithfulness = faithfulness_table(read_faithfulness(evaluation))
    more = (*([faithfulness] if faithfulness else []), *more)
    kits = config.eval.predictions
    left_out: tuple[str, ...] = ()
    if kits:
        written = write_predictions(evaluation, kits, config.model.path)
        table = predictions_table(written)
        more, left_out = ((*more, table), ()) if table else (more, written.left_out)
    note = toy_note(model_folder(config.model.path))
    show_results(folder, step=0, before=_compared(config), more=more, note=note)
    for sentence in left_out:
        Console().print(sentence, soft_wrap=True, markup=False)
    for kit in kits:
        label = f"{kit}:"
        Console().print(f"{label:{WIDTH}}{evaluation / FOLDER / kit}", soft_wrap=True, markup=False)


def _compared(config: RunConfig) -> Path | None:
    """Return the folder of the evaluation to compare with."""
    return Path(config.compare_to) if config.compare_to else None
