"""Measure how reliable answers are: `python -m rlmed.reliability model=DIR data=FILE.jsonl`.

It evaluates as `rlmed.evaluate` does, with the same settings, and then asks every question again:
for calibration, pass@k, other orders of the options, and whether the answer follows from picture
and reasoning (docs/reliability.md). `data.train=FILE` separates the modalities of the training rows
from others.
"""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command()  # before torch is imported

from pathlib import Path

from rewards.conclusion import argued_option
from rlmed.cluster.commands import build_local_sampling
from rlmed.commandline import run_command
from rlmed.core.config.schema import RunConfig
from rlmed.data.stream import SEED_STRIDE
from rlmed.evaluate import open_evaluation, show_evaluation
from rlmed.evaluation.reliability.questions import ReliabilitySettings, measure_reliability
from rlmed.evaluation.reliability.table import reliability_table
from rlmed.recording.progress import Progress


def main(config: RunConfig, folder: Path) -> None:
    """Evaluate `config.model` on `config.data.eval`, then ask the same questions again."""
    config.check_samples()
    progress = Progress()
    evaluator, sampling = open_evaluation(config, folder, progress, build_local_sampling)
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


if __name__ == "__main__":
    run_command("reliability", main)
