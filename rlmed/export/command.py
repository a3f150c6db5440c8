"""Export a run's model as a Hugging Face folder: `python -m rlmed.export RUN --out DIR`.

The folder holds merged weights, settings that answer as evaluation did, a chat template with the
prompt of training, and a model card with the run's results. Then it is checked that the folder
answers as the run's checkpoint does, whoever computes (`rlmed.export.check`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rlmed.core.process.display import ending_errors, keep_display
from rlmed.core.process.starting import loading_libraries

CHECKED = 20
"""Questions of the check, unless `--check` says otherwise."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rlmed.export",
        description="Export a run's model as a Hugging Face folder, and check its answers.",
    )
    parser.add_argument("run", type=Path, help="run folder (outputs/NAME/DATE), or a checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--checkpoint", metavar="STEP", help="step, last (default) or best, by mean accuracy")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights (default: that of training)")
    parser.add_argument("--check", type=int, metavar="N", help=f"questions to check answers on (default: {CHECKED})")
    parser.add_argument("--check-vllm", type=int, default=0, metavar="N", help="the same by `vllm serve` (default: 0)")
    parser.add_argument("--questions", type=Path, nargs="+", metavar="FILE", help="for the check, instead of the run's")
    parser.add_argument(
        "--extra-tasks",
        nargs="+",
        default=[],
        metavar="MODULE:CLASS",
        help="as data.extra_tasks (default: the run's own, if they can be imported)",
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="upload the folder as this model, private if it is new")
    parser.add_argument("--public", action="store_true", help="with --push-to-hub: create a public model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Export; exit with status 1 if answers differ, with one line and status 2 on an error."""
    keep_display()
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    with ending_errors():
        with loading_libraries():  # only now: `--help` and errors in the arguments need none
            from rlmed.export.exporting import export
        same = export(parsed, Console())
    if not same:
        raise SystemExit(1)
