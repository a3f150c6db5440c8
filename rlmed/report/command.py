"""The command `python -m rlmed.report RUN_FOLDER`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rlmed.core.process.display import ending_errors, keep_display
from rlmed.recording.inputs import CONFIG_FILE
from rlmed.report.page import read_config, write_report
from rlmed.tasks.registry import settle_tasks

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of the run folder given on the command line."""
    parser = argparse.ArgumentParser(prog="python -m rlmed.report", description="Write a run folder's report.html.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--sft", type=Path, metavar="FOLDER", help="run of rlmed.sft to show in the same table")
    parser.add_argument("--extra-tasks", nargs="+", default=[], metavar="MODULE:CLASS", help="as data.extra_tasks")
    parser.add_argument(
        "--synonyms", metavar="FILE", help="as data.synonyms (default: the run's own file, if it is still there)"
    )
    keep_display()
    parsed = parser.parse_args(arguments)
    with ending_errors():
        synonyms = parsed.synonyms or _own_synonyms(parsed.run_folder)
        # tasks are not those in config.yaml: a folder from elsewhere would run its code
        settle_tasks(parsed.extra_tasks, synonyms, key="--extra-tasks")
        report = write_report(parsed.run_folder, sft=parsed.sft)
    sys.stdout.write(f"report: {report}\n")


def _own_synonyms(folder: Path) -> str | None:
    """Return the run's `data.synonyms`; None without one, or with a warning if it is not there."""
    data = read_config(folder / CONFIG_FILE)[1].get("data")
    path = data.get("synonyms") if isinstance(data, dict) else None
    if not isinstance(path, str) or not path:
        return None
    if not Path(path).is_file():
        log.warning("data.synonyms=%s of the run is not there: rollouts are judged without it; give --synonyms", path)
        return None
    return path
