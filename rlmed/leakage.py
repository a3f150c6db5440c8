"""Find leaked test rows: `python -m rlmed.leakage --train x.jsonl --test a.jsonl b.jsonl`."""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlmed.core.files.atomic import replace_text
from rlmed.core.process.display import ending_errors, keep_display
from rlmed.core.types import Example
from rlmed.data.examples import format_skips, read_examples
from rlmed.data.leakage.findings import KINDS, WORDS, LeakageReport, describe
from rlmed.data.leakage.search import find_leakage

SHOWN = 20
"""Pairs to show in the terminal; `--json` writes all."""


def leakage_table(report: LeakageReport) -> Table:
    """Return a table of leaking rows and pictures by test file."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"against {report.train_rows} training rows over {report.train_images} pictures",
        title_justify="right",
    )
    kinds = [kind for kind in KINDS if any(kind in file.images_by_kind for file in report.files)]
    headings = ("file", "rows", "leaking", "with answer", "pictures", *(WORDS[kind] for kind in kinds), "in doubt")
    for column, heading in enumerate(headings):
        # one word per line, for a terminal of 80 characters
        table.add_column(heading.replace(" ", "\n"), justify="left" if column == 0 else "right", no_wrap=column > 0)
    for file in report.files:
        counts = (file.images_by_kind.get(kind, 0) for kind in kinds)
        cells = (file.rows, file.leaking_rows, file.repeated_rows, file.images, *counts, file.doubtful)
        table.add_row(file.name, *(str(cell) for cell in cells))
    return table


def _read(path: Path) -> tuple[Example, ...]:
    read = read_examples(path)
    if read.skipped:
        sys.stderr.write(f"{format_skips(read, record='')}\n")
    return read.examples


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the files named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m rlmed.leakage", description=__doc__)
    parser.add_argument("--train", type=Path, required=True, metavar="FILE", help="training rows, JSON Lines")
    parser.add_argument("--test", type=Path, required=True, nargs="+", metavar="FILE", help="files to evaluate on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file")
    keep_display()
    parsed = parser.parse_args(arguments)
    with ending_errors():
        report = _compare(parsed)
    console = Console(highlight=False)
    console.print(leakage_table(report))
    for leak in report.leaks[:SHOWN]:
        console.print(f"{leak.file}: {describe(leak)}", markup=False, soft_wrap=True)
    if len(report.leaks) > SHOWN:
        console.print(f"… {len(report.leaks)} pairs in all; --json FILE writes them")


def _compare(parsed: Any) -> LeakageReport:
    names = [path.stem for path in parsed.test]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--test has files of the same name ({', '.join(names)}): rename one, results are keyed by name"
        )
    report = find_leakage(_read(parsed.train), {path.stem: _read(path) for path in parsed.test})
    if parsed.json is not None:
        replace_text(parsed.json, json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n")
    return report


if __name__ == "__main__":
    main()
