"""Train a policy by reinforcement learning and report the result: `python -m rlmed.launch +experiment=medvqa_600`."""

from __future__ import annotations

import logging
from pathlib import Path

from rlmed.commandline import run_command
from rlmed.core.config.schema import RunConfig
from rlmed.run import Run

log = logging.getLogger(__name__)


def main(config: RunConfig, folder: Path) -> None:
    """Run the training described by `config` in `folder`."""
    if config.name.endswith("_embedded") and config.profile == "auto":
        log.info(
            "no CUDA device: running the embedded profile (%s on %s). "
            "For the real run, on a GPU: python -m rlmed.launch +experiment=%s profile=paper",
            config.model.path,
            "generated images" if config.data.source == "phantom" else config.data.train,
            config.name.removesuffix("_embedded"),
        )
    Run(config, folder).execute()


if __name__ == "__main__":
    run_command("train", main)
