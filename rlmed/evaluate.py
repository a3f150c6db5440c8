"""Measure a model's accuracy, with controls: `python -m rlmed.evaluate model=DIR data=FILE.jsonl`.

`data=phantom` evaluates on the generated images, `data=[a.jsonl,b.jsonl]` on several files;
`data.train=FILE` fits the image-free prior; `compare_to=RUN/evaluations/step-000000` adds McNemar's
test against an earlier evaluation of the same rows; `rlmed.reliability` adds calibration, pass@k,
option order and reliance on the picture.
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
    """Evaluate `config.model` on `config.data.eval`."""
    with loading_libraries():  # only now: `--help` and errors in the settings need none
        from rlmed.evaluation_run import evaluate
    evaluate(config, folder)


def dry_run(config: RunConfig, checkpoint: Path | None = None, began: float | None = None) -> None:
    """Print what the command would do, and about how long it takes."""
    with loading_libraries():
        from rlmed.dry_run import try_evaluation
    try_evaluation(config, began)


if __name__ == "__main__":
    run_command("evaluate", main, dry_run)
