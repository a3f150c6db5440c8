"""Measure how reliable answers are: `python -m rlmed.reliability model=DIR data=FILE.jsonl`.

It evaluates as `rlmed.evaluate` does, with the same settings, and then asks every question again:
for calibration, pass@k, other orders of the options, and whether the answer follows from picture
and reasoning (docs/reliability.md). `data.train=FILE` separates the modalities of the training rows
from others.
"""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)  # before torch is imported

from pathlib import Path

from rlmed.commandline import run_command
from rlmed.core.config.schema import RunConfig
from rlmed.core.process.starting import loading_libraries


def main(config: RunConfig, folder: Path) -> None:
    """Evaluate `config.model` on `config.data.eval`, then ask the same questions again."""
    config.check_samples()
    with loading_libraries():  # only now: `--help` and errors in the settings need none
        from rlmed.evaluation_run import evaluate_reliability
    evaluate_reliability(config, folder)


if __name__ == "__main__":
    run_command("reliability", main)
