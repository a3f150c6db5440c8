"""Train a policy by RL and report the result: `python -m rlmed.launch +experiment=medvqa_600`."""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command()  # before torch is imported

import logging
from pathlib import Path

import torch

from rlmed.commandline import run_command
from rlmed.core.config.schema import RunConfig
from rlmed.run import Run

log = logging.getLogger(__name__)


def main(config: RunConfig, folder: Path) -> None:
    """Run the training described by `config` in `folder`."""
    if config.profile == "tiny" and not torch.cuda.is_available():
        log.info(
            "no CUDA device: profile=tiny (%s on %s). The paper's run, on a GPU, is the same command with profile=paper",
            config.model.path,
            "generated images" if config.data.source == "phantom" else config.data.train,
        )
    Run(config, folder).execute()


if __name__ == "__main__":
    run_command("train", main)
