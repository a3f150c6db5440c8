"""Fine-tune on written answers, as alignment before RL or as its baseline: `python -m rlmed.sft`.

The target is a row's `completion` if it has one, else its letter alone, `<answer>B</answer>`, all
that a data set without rationales offers (the SFT baseline of MedVLM-R1, arXiv 2502.19634).
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
    """Run the fine-tuning described by `config` in `folder`."""
    with loading_libraries():  # only now: `--help` and errors in the settings need none
        from rlmed.sft_run import finetune
    finetune(config, folder)


def dry_run(config: RunConfig, checkpoint: Path | None = None, began: float | None = None) -> None:
    """Print what the command would do from `checkpoint` on, and about how long it takes."""
    with loading_libraries():
        from rlmed.dry_run import try_finetuning
    try_finetuning(config, checkpoint, began)


if __name__ == "__main__":
    run_command("sft", main, dry_run)
