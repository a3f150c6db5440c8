"""Train a policy by RL and report the result: `python -m rlmed.launch +experiment=medvqa_600`."""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)  # before torch is imported

from pathlib import Path

from rlmed.commandline import run_command
from rlmed.core.config.schema import RunConfig
from rlmed.core.process.starting import loading_libraries


def main(config: RunConfig, folder: Path) -> None:
    """Run the training described by `config` in `folder`."""
    with loading_libraries():  # only now: `--help` and errors in the settings need none
        from rlmed.run import Run
    Run(config, folder).execute()


def dry_run(config: RunConfig, checkpoint: Path | None = None, began: float | None = None) -> None:
    """Print what the command would do from `checkpoint` on, and about how long it takes."""
    with loading_libraries():
        from rlmed.dry_run import try_training
    try_training(config, checkpoint, began)


if __name__ == "__main__":
    run_command("train", main, dry_run)
