"""Convert data to rlmed's format: `python -m rlmed.prepare READER --source PATH --out DIR`."""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from rlmed.core.process.display import ending_errors, keep_display
from rlmed.data.leakage.findings import doubt_lines, leakage_lines
from rlmed.data.options.order import kept_order_text
from rlmed.data.prepare.prepared_data import MANIFEST, PreparedData, check_target, write_prepared_data
from rlmed.data.readers.registry import READERS, find_reader
from rlmed.data.rows import grouped

REASONS_SHOWN = 3
"""Kinds of skipped rows to show in the terminal; the manifest lists all rows."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; each reader has its own options."""
    parser = argparse.ArgumentParser(
        prog="python -m rlmed.prepare",
        description="Convert data to JSON Lines and images, for data.train and data.eval. See docs/data.md.",
    )
    readers = parser.add_subparsers(dest="reader", required=True, metavar="READER", title="readers")
    for reader in READERS.values():
        own = readers.add_parser(reader.name, help=reader.summary, description=reader.description)
        own.add_argument("--source", type=Path, required=True, metavar="PATH", help="file or folder to read")
        own.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
        own.add_argument(
            "--on-bad-row", choices=("skip", "error"), default="skip", help="leave bad rows out (default), or stop"
        )
        own.add_argument(
            "--leakage",
            choices=("report", "off"),
            default="report",
            help="search the other files for training pictures and rows (default), or don't",
        )
        own.add_argument("--overwrite", action="store_true", help="replace the output of an earlier call in --out")
        for option in reader.options:
            # the reader has its own defaults
            own.add_argument(option.flag, default=argparse.SUPPRESS, **option.settings)
    return parser.parse_args(arguments)


def prepare(arguments: argparse.Namespace, on_row: Callable[[int], None] | None = None) -> PreparedData:
    """Read the source and write the converted data.

    Raises:
        ValueError: for an invalid source, option or target, or without a usable row.
        RecordError: if writing fails.
    """
    reader = find_reader(arguments.reader)
    keywords = {option.keyword for option in reader.options}
    options = {key: value for key, value in vars(arguments).items() if key in keywords}
    for option in reader.options:
        option.check(options)
    # before anything is read
    check_target(arguments.out, arguments.source, overwrite=arguments.overwrite)
    return write_prepared_data(
        reader.read(arguments.source, **options),
        arguments.out,
        reader=reader,
        source=arguments.source,
        options=options,
        on_bad_row=arguments.on_bad_row,
        overwrite=arguments.overwrite,
        leakage=arguments.leakage == "report",
        on_row=on_row,
    )


def summary(prepared: PreparedData) -> Table:
    """Return a table of rows, images and image-free accuracies by split."""
    table = Table(box=box.SIMPLE_HEAD, title="accuracy without an image, %", title_justify="right")
    headings = ("split", "rows", "images", "chance", "one letter", "option prior", "by rate")
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column == 0 else "right")
    for name, split in prepared.splits.items():
        priors = split.priors
        shares = (
            (priors.chance, priors.majority_letter, priors.leave_one_out, priors.leave_one_out_by_rate)
            if priors
            else ()
        )
        shown = [f"{100 * share:.1f}" for share in shares] or ["-"] * 4
        table.add_row(name, str(split.rows), str(split.images), *shown)
    return table


def tasks(prepared: PreparedData) -> list[str]:
    """Return, by split, how many rows each task has, where not all are multiple choice."""
    return [
        f"tasks:      {name}: {', '.join(f'{count:,} {task}' for task, count in split.by_task.items())}"
        for name, split in prepared.splits.items()
        if set(split.by_task) != {"choice"}
    ]


def counts(prepared: PreparedData) -> str:
    """Return how many source rows were written, skipped and left out; the counts add up."""
    parts = [f"{prepared.written:,} written"]
    parts += [f"{prepared.bad:,} skipped"] if prepared.bad else []
    parts += [f"{prepared.by_choice:,} left out"] if prepared.by_choice else []
    return f"read:       {prepared.read:,} row{'s' * (prepared.read > 1)}: {', '.join(parts)}"


def skips(prepared: PreparedData) -> str:
    """Return how many rows were left out, with the most common reasons; empty without any."""
    bad = [row for row in prepared.skipped if not row.chosen]
    reasons = grouped([(f"{row.where} ({row.id})", row.reason) for row in bad])
    lines = [f"- {reason}" for reason in reasons[:REASONS_SHOWN]]
    if bad:
        few = f", {REASONS_SHOWN} of {len(reasons)} reasons shown" if len(reasons) > REASONS_SHOWN else ""
        listed = f"{few}, all in {MANIFEST}" if len(bad) > len(lines) else ""
        lines.insert(0, f"skipped:    {len(bad)} bad row{'s' * (len(bad) > 1)}{listed}")
    chosen: Counter[str] = Counter()
    for row in prepared.skipped:
        if row.chosen:
            chosen[row.reason] += row.rows
    return "\n".join(
        lines + [f"left out:   {count} row{'s' * (count > 1)}: {reason}" for reason, count in chosen.most_common(5)]
    )


def kept_orders(prepared: PreparedData) -> list[str]:
    """Return, by split, how many rows have options that cannot be reordered."""
    return [
        f"order:      {name}: {kept_order_text(split.kept_order, split.rows, split.kept_order_by)}"
        for name, split in prepared.splits.items()
        if split.kept_order
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert the data and print a summary; on an error, print one line and exit with status 2."""
    keep_display()
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    console = Console(highlight=False)
    with ending_errors(interrupted="interrupted; nothing was written"), _counter(console) as on_row:
        prepared = prepare(parsed, on_row)
    console.print(summary(prepared))
    found = [*leakage_lines(prepared.leakage), *doubt_lines(prepared.leakage)] if prepared.leakage else []
    leaks = [f"leakage:    {line}" for line in found]
    lines = [
        counts(prepared),
        skips(prepared),
        *tasks(prepared),
        *kept_orders(prepared),
        *leaks,
        f"written:    {prepared.folder / MANIFEST}",
    ]
    for text in filter(None, lines):
        console.print(text, markup=False, soft_wrap=True)


@contextmanager
def _counter(console: Console) -> Iterator[Callable[[int], None]]:
    """Show a row counter on a terminal."""
    with console.status("reading") as status:

        def on_row(count: int) -> None:
            if count % 100 == 0:
                status.update(f"reading: {count:,} rows")

        yield on_row


if __name__ == "__main__":
    main()
