"""The steps of an export: write the folder, check its answers, upload it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from rlmed.core.files.atomic import replace_text
from rlmed.core.types import Example
from rlmed.export.card import CARD, model_card
from rlmed.export.check import (
    MAX_TOKENS,
    Answer,
    Difference,
    Reference,
    ask_answers,
    choose_questions,
    compare,
    transformers_answers,
)
from rlmed.export.command import CHECKED
from rlmed.export.folder import Exported, check_target, exported_dtype, new_folder, write_folder
from rlmed.export.hub import check_access, push
from rlmed.export.server import check_installed, vllm_answers
from rlmed.export.source import Source, evaluated_files, find_source
from rlmed.export.template import CHOICE
from rlmed.recording.run_tasks import FLAG, settle_run_tasks
from rlmed.tasks.registry import task_named

log = logging.getLogger(__name__)


def export(arguments: argparse.Namespace, console: Console) -> bool:
    """Export, check and upload; return whether all answers were the same.

    Raises:
        ValueError: for a run, target or questions that cannot be used.
        OSError: if the folder cannot be written.
    """
    disable_progress_bar()  # rlmed has its own
    check_target(arguments.out)
    source = find_source(arguments.run, arguments.checkpoint)
    # prompts need no synonyms
    missing = settle_run_tasks(source.run or arguments.run, source.config, arguments.extra_tasks)
    _check_tasks(source, missing)
    if arguments.public and not arguments.push_to_hub:
        raise ValueError("--public has no effect without --push-to-hub: leave it out")
    repository = check_access(arguments.push_to_hub) if arguments.push_to_hub else None
    checked, served = _counts(arguments, source)
    if served:
        check_installed()
    examples = _questions(arguments, source, max(checked, served))
    tasks = _tasks(source, examples)
    dtype = arguments.dtype or exported_dtype(source.checkpoint)
    with new_folder(arguments.out) as folder:
        exported = write_folder(folder, source, dtype, tasks)
        name = arguments.out.absolute().name
        recorded = (file.get("most_images", 1) for file in (*source.trained_on, *source.evaluated_on))
        images = max(1, *recorded, *(len(example.images) for example in examples))
        replace_text(folder / CARD, model_card(source, exported, name, images=images))
    console.print(f"exported:   {arguments.out} ({source.checkpoint.name}, {dtype})", soft_wrap=True, highlight=False)
    same = True
    if examples:
        report = _check(arguments.out, source, exported, (examples[:checked], examples[:served]), console)
        same = not any(not difference.tie for found in report.values() for difference in found)
        if same:
            said = {
                who: (min(len(examples), served if "vllm" in who else checked), found) for who, found in report.items()
            }
            replace_text(arguments.out / CARD, model_card(source, exported, name, images=images, checked=said))
    if repository and same:
        console.print(f"uploaded:   {push(arguments.out, repository, public=arguments.public)}", soft_wrap=True)
    elif repository:
        console.print("not uploaded: its answers differ")
    return same


def _check_tasks(source: Source, missing: str | None) -> None:
    """Raise ValueError for a run with rows of a user's task whose code was not found or given."""
    try:
        for name in source.tasks:
            task_named(name)
    except ValueError as error:
        raise ValueError(
            missing
            or f"{source.run} has rows of the task {name!r}, whose code is not rlmed's: add {FLAG} MODULE:CLASS, if you "
            "trust that code"
        ) from error


def _tasks(source: Source, examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the tasks of the run; those of the questions if it is not known.

    Raises:
        ValueError: for questions of other tasks than the run's.
    """
    asked = tuple(sorted({example.task for example in examples}))
    known = source.tasks or asked or (CHOICE,)
    if others := [task for task in asked if task not in known]:
        raise ValueError(
            f"--questions has rows of the task {others[0]}, and the run's are of {', '.join(known)}: leave these rows out"
        )
    return known


def _counts(arguments: argparse.Namespace, source: Source) -> tuple[int, int]:
    """Return the number of questions to ask here, and by `vllm serve`."""
    for option, count in (("--check", arguments.check), ("--check-vllm", arguments.check_vllm)):
        if count is not None and count < 0:
            raise ValueError(f"{option} {count}: give a number of questions, 0 for none")
    if arguments.check is not None:
        return arguments.check, arguments.check_vllm
    known = source.run is not None or arguments.questions
    if not known:
        log.warning("no run says which questions to check the answers on: give --questions FILE.jsonl; not checked")
    return (CHECKED if known else 0), arguments.check_vllm


def _questions(arguments: argparse.Namespace, source: Source, count: int) -> list[Example]:
    if not count:
        return []
    if arguments.questions is None and source.run is None:
        raise ValueError("--check and --check-vllm need questions, and no run names any: give --questions FILE.jsonl")
    examples = choose_questions(arguments.questions or list(evaluated_files(source)), count)
    if not examples and arguments.check is None and not arguments.check_vllm:
        log.warning("the run was not evaluated on any file: its answers are not checked; give --questions FILE.jsonl")
    elif not examples:
        raise ValueError("the run was not evaluated on any file: give --questions FILE.jsonl, or --check 0")
    return examples


def _check(
    folder: Path,
    source: Source,
    exported: Exported,
    examples: tuple[list[Example], list[Example]],
    console: Console,
) -> dict[str, list[Difference]]:
    """Answer the questions and print what differs; return the differences by who answered."""
    asked, served = examples
    limit = exported.max_new_tokens or MAX_TOKENS
    longest = max(examples, key=len)
    reference = Reference(source.checkpoint, exported.dtype, longest, limit, wrapped=exported.wrapped)
    sides: list[tuple[str, Sequence[Example], Callable[[], list[Answer]]]] = []
    if asked:
        sides += [
            ("rlmed.ask", asked, lambda: ask_answers(folder, asked, limit)),
            ("transformers", asked, lambda: transformers_answers(folder, reference, asked, limit)),
        ]
    if served:
        sides.append(("vllm serve", served, lambda: vllm_answers(folder, reference, served, limit)))
    report = {}
    for who, questions, answer in sides:
        found = report[who] = compare(reference, who, answer)
        equal = len(questions) - len(found)
        ties = sum(difference.tie for difference in found)
        console.print(
            f"{who + ':':14}{equal} of {len(questions)} answers are the checkpoint's, character by character"
            + (f"; {ties} part at a tie" if ties else ""),
            soft_wrap=True,
            highlight=False,
        )
        for difference in found:
            for line in difference.lines():
                console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
    return report
