"""The command `python -m rlmed.report RUN_FOLDER`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmed.core.process.display import ending_errors, keep_display
from rlmed.recording.inputs import CONFIG_FILE
from rlmed.recording.run_tasks import FLAG, settle_run_tasks
from rlmed.report.page import REPORT_FILE, read_config, write_report

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of the run folder given on the command line."""
    parser = argparse.ArgumentParser(prog="python -m rlmed.report", description="Write a run folder's report.html.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--sft", type=Path, metavar="FOLDER", help="run of rlmed.sft to show in the same table")
    parser.add_argument(
        FLAG,
        nargs="+",
        default=[],
        metavar="MODULE:CLASS",
        help="as data.extra_tasks (default: the run's own, if they can be imported)",
    )
    parser.add_argument(
        "--synonyms", metavar="FILE", help="as data.synonyms (default: the run's own file, if it is still there)"
    )
    keep_display()
    parsed = parser.parse_args(arguments)
    with ending_errors():
        _, config = read_config(parsed.run_folder / CONFIG_FILE)
        synonyms = parsed.synonyms or _own_synonyms(config)
        if missing := settle_run_tasks(parsed.run_folder, config, parsed.extra_tasks, synonyms):
            if (parsed.run_folder / REPORT_FILE).exists():
                raise ValueError(f"{missing}; {REPORT_FILE} is left as it was")
            log.warning("%s; until then rollouts of this task are not judged", missing)
        report = write_report(parsed.run_folder, sft=parsed.sft)
    sys.stdout.write(f"report: {report}\n")


def _own_synonyms(config: Mapping[Any, Any]) -> str | None:
    """Return the run's `data.synonyms`; None without one, or with a warning if it is not there."""
    data = config.get("data")
    path = data.get("synonyms") if isinstance(data, dict) else None
    if not isinstance(path, str) or not path:
        return None
    if not Path(path).is_file():
        log.warning("data.synonyms=%s of the run is not there: rollouts are judged without it; give --synonyms", path)
        return None
    return path
