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

ANSWERS = {"open": "texts", "grounding": "boxes", "labels": "labels", "report": "reports"}
"""What the answers to a task are."""
MAY_BE_NOTHING = ("grounding", "labels")
"""Tasks to which the right answer may be that there is nothing."""


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


def summary(prepared: PreparedData) -> list[Table]:
    """Return tables by split: image-free accuracies of multiple choice, and rows of other tasks."""
    return [table for table in (_choice_table(prepared), _task_table(prepared)) if table.row_count]


def _choice_table(prepared: PreparedData) -> Table:
    headings = ("split", "rows", "images", "chance", "one letter", "option prior", "by rate")
    table = _table("accuracy without an image, %", headings, texts=1)
    for name, split in prepared.splits.items():
        if split.priors is None:
            continue
        priors = split.priors
        shares = (priors.chance, priors.majority_letter, priors.leave_one_out, priors.leave_one_out_by_rate)
        images = split.choice_images
        table.add_row(name, str(split.by_task["choice"]), str(images), *(f"{100 * share:.1f}" for share in shares))
    return table


def _task_table(prepared: PreparedData) -> Table:
    found = [(name, task, of) for name, split in prepared.splits.items() for task, of in split.tasks.items()]
    others = any(split.priors for split in prepared.splits.values())
    nothing = ("nothing",) if any(task in MAY_BE_NOTHING for _, task, _ in found) else ()
    headings = ("split", "task", "rows", "images", "answers", *nothing, "one answer, %")
    table = _table("rows of other tasks" if others else "rows by task", headings, texts=2)
    for name, task, of in found:
        answers = f"{of.answers} {ANSWERS.get(task, '')}".strip()
        empty = (str(of.nothing) if task in MAY_BE_NOTHING else "-",) if nothing else ()
        share = f"{100 * of.commonest / of.rows:.1f}"
        table.add_row(name, task, str(of.rows), str(of.images), answers, *empty, share)
    return table


def _table(title: str, headings: Sequence[str], texts: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="right")
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column < texts else "right")
    return table


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
    for table in summary(prepared):
        console.print(table)
    found = [*leakage_lines(prepared.leakage), *doubt_lines(prepared.leakage)] if prepared.leakage else []
    leaks = [f"leakage:    {line}" for line in found]
    lines = [
        counts(prepared),
        skips(prepared),
        *kept_orders(prepared),
        *leaks,
        *(f"rows:       {prepared.folder / split.file}" for split in prepared.splits.values()),
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
