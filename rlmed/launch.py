"""Train a policy by RL and report the result: `python -m rlmed.launch +experiment=medvqa_600`."""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)  # before torch is imported

import logging
from pathlib import Path

from rlmed.commandline import run_command
from rlmed.core.config.schema import RunConfig
from rlmed.core.process.starting import loading_libraries

log = logging.getLogger(__name__)


def main(config: RunConfig, folder: Path) -> None:
    """Run the training described by `config` in `folder`."""
    with loading_libraries():  # only now: `--help` and errors in the settings need none
        import torch

        from rlmed.run import Run
    if config.profile == "tiny" and not torch.cuda.is_available():
        log.info(
            "no CUDA device: profile=tiny (%s on %s). The paper's run, on a GPU, is the same command with profile=paper",
            config.model.path,
            "generated images" if config.data.source == "phantom" else config.data.train,
        )
    Run(config, folder).execute()


if __name__ == "__main__":
    run_command("train", main)
