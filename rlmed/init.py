"""Write a configuration of your own: `python -m rlmed.init DIR --data rows.jsonl --model FOLDER`.

It asks for what is not given, chooses the largest settings that fit the GPU, and says how to go on.
"""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import yaml

from rlmed.core.config.composing import compose_config
from rlmed.core.config.overrides import quoted
from rlmed.core.files.atomic import refusal
from rlmed.core.files.other_formats import to_prepare
from rlmed.core.process.display import ending_errors, keep_display
from rlmed.core.process.starting import loading_libraries
from rlmed.core.types import Example
from rlmed.data.examples import format_skips, read_examples

Value = TypeVar("Value")
TINY = "embedded:tiny_base"
MEMORY = "24, 48, 80, or whatever it has; 8x80 for eight GPUs; none for this machine's CPU"
TASKS = ("choice", "open", "grounding", "labels", "report", "mixed")
OF_TINY = {
    "algo.group_size": 8,
    "algo.groups_per_step": 8,
    "rollout.max_tokens": 64,
    "eval.max_tokens": 64,
    "data.max_prompt_tokens": 256,
    "learner.lr": 6e-5,
    "learner.warmup_steps": 5,
}
"""Sizes and rates of the embedded model, as `profile=tiny` has them."""
NEW = ("conf/experiment/mine.yaml", "my_rewards.py")
"""Files that are never there before; a README.md or .gitignore may be, and is kept."""
EPOCHS = 2
REWARDS = '''"""Rewards of your own: `reward.extra=[my_rewards:few_words]` adds one."""


def few_words(example, completion):
    """1 for a completion of at most 40 words, reasoning included, else 0."""
    return float(len(completion.text.split()) <= 40)
'''


def rows_of(path: Path, flag: str) -> tuple[Example, ...]:
    """Return the usable rows of a data file.

    Raises:
        ValueError: if it is missing, or has none.
    """
    if path.is_dir():
        inside = ", ".join(sorted(entry.name for entry in path.glob("*.jsonl")))
        listed = f"{path} is a folder: give a file of rows, JSON Lines (there: {inside})"
        raise ValueError(f"{flag} {listed if inside else to_prepare(path)}")
    if not path.is_file():
        raise ValueError(f"{flag} {path}: file not found in {Path.cwd()}: correct the path")
    read = read_examples(path)
    if read.skipped:
        sys.stderr.write(f"{format_skips(read, record='')}\n")
    return read.examples


def check_evaluated(paths: Sequence[Path]) -> None:
    """Check the files to evaluate on.

    Raises:
        ValueError: if one has no usable rows, or two have the same name.
    """
    with loading_libraries():
        from rlmed.data.loading import check_names
    check_names([str(path) for path in paths], key="--eval")
    for path in paths:
        rows_of(path, "--eval")


def task_of_rows(rows: Sequence[Example], wanted: str | None) -> str:
    """Return the task of the rows, or "mixed".

    Raises:
        ValueError: if it is not the one that was asked for.
    """
    tasks = sorted({row.task for row in rows})
    found = tasks[0] if len(tasks) == 1 else "mixed"
    if wanted is not None and wanted != found:
        raise ValueError(
            f"--task {wanted}: the rows of --data are of the task {', '.join(tasks)}: give --task {found}, or other rows"
        )
    return found


def experiment(arguments: argparse.Namespace, rows: Sequence[Example], task: str) -> str:
    """Return the text of the experiment's file.

    Raises:
        ValueError: for a model that cannot be read, or fits no settings.
    """
    with loading_libraries():
        from rlmed.cluster.fitting import fit
        from rlmed.cluster.memory import GIB
    tiny = arguments.model == TINY
    lengths = OF_TINY if tiny else {}
    path = arguments.model if tiny or not Path(arguments.model).is_dir() else str(Path(arguments.model).resolve())
    reward = "format_choice" if task == "choice" else "task"
    train = str(arguments.data.resolve())
    evals = [str(file.resolve()) for file in arguments.eval]
    overrides = ["data=jsonl", f"model.path={quoted(path, commas=False)}", f"reward={reward}"]
    overrides += [f"{key}={value}" for key, value in lengths.items()]
    gpus, memory = gpus_of(arguments.gpu_memory)
    found = fit(overrides, gpu_gib=memory, gpus=gpus)
    per_step = compose_config("train", overrides).algo.groups_per_step
    keys = {
        "name": "mine",
        "steps": math.ceil(EPOCHS * len(rows) / per_step),
        "model.path": path,
        "data.train": train,
        "data.eval": evals,
        **lengths,
        **found.keys,
    } | ({"model.dtype": "bfloat16"} if memory else {"model.device": "cpu"})
    groups = {"data": "jsonl", "reward": reward} | found.groups
    defaults = "".join(f"  - override /{group}: {option}\n" for group, option in groups.items())
    where = "this machine's CPU" if memory is None else f"GPUs of {arguments.gpu_memory} GiB"
    return (
        f"# @package _global_\n# Chosen for {where}: about {found.bytes / GIB:.1f} GiB a process, by the estimate of "
        f"rlmed.\n# {EPOCHS} epochs of {len(rows)} questions (task: {task}). Change what you like.\n"
        f"defaults:\n{defaults}  - _self_\n\n{yaml.safe_dump(nested(keys), sort_keys=False, allow_unicode=True)}"
        "\n# Rewards of your own, from my_rewards.py:\n# reward:\n#   extra: ['my_rewards:few_words']\n"
    )


def nested(keys: dict[str, object]) -> dict[str, object]:
    """Return dotted keys as nested mappings, whose texts OmegaConf takes as they are."""
    tree: dict[str, object] = {}
    for key, value in keys.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})  # type: ignore[assignment]
        place[name] = _plain(value)
    return tree


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def next_commands(folder: Path, *, evaluates: bool) -> str:
    """Return the next three commands, for the folder from which `folder` is named.

    The last one names rows as `FILE` unless the configuration `evaluates` rows of its own.
    """
    rows = "" if evaluates else " data=FILE.jsonl"
    conf = shlex.quote(str(folder / "conf"))
    common = f"--config-dir {conf} +experiment=mine"
    return (
        f"python -m rlmed.launch --dry-run {common}    # memory, steps and time, nothing written\n"
        f"python -m rlmed.launch {common}\n"
        f"python -m rlmed.evaluate {common} model=outputs/mine/DATE/checkpoints/step-NUMBER{rows}\n"
    )


def gpus_of(text: str) -> tuple[int, float | None]:
    """Return how many GPUs `8x80` has, and the GiB of each; None for `none`.

    Raises:
        ValueError: for anything else.
    """
    plain = text.strip().lower()
    if plain == "none":
        return 1, None
    form = re.fullmatch(r"(8x)?(\d{1,4}(?:\.\d+)?)(?: *gi?b)?", plain)
    if form is None or float(form[2]) == 0:
        raise ValueError(f"--gpu-memory {text}: give the GiB of the GPU ({MEMORY})")
    return 8 if form[1] else 1, float(form[2])


def check_folder(folder: Path) -> None:
    """Check that a configuration can be written to a folder, which may be there.

    Raises:
        ValueError: if it is a file, or has a configuration already.
    """
    taken = [path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()]
    if taken:
        raise ValueError(f"{taken[0]} is a file: name a folder to write to, before or after the flags")
    if existing := [name for name in NEW if (folder / name).exists()]:
        raise ValueError(f"{folder / existing[0]} exists already: choose another folder, or remove it")


def write_folder(folder: Path, files: dict[str, str]) -> list[str]:
    """Write files, but those of `NEW` alone where others are there; return their names.

    Raises:
        ValueError: as `check_folder`; none is written then.
        RecordError: if writing fails.
    """
    check_folder(folder)
    names = [name for name in files if name in NEW or not (folder / name).exists()]
    for name in names:
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[name], encoding="utf-8")
        except OSError as error:
            for written in names[: names.index(name) + 1]:  # the command, run again, would refuse them
                with suppress(OSError):
                    (folder / written).unlink(missing_ok=True)
            raise refusal(path, error, advice="run the command again, or name another folder") from error
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask for what is missing, write the folder, print the next commands."""
    keep_display()
    with ending_errors(EOFError):
        parsed = _parse(arguments)
        check_folder(parsed.folder)
        parsed = _ask(parsed)
        task = task_of_rows(parsed.rows, parsed.task)
        folder, commands = parsed.folder, next_commands(parsed.folder, evaluates=bool(parsed.eval))
        readme = "# A configuration of rlmed\n\nThe next three commands, from this folder:\n\n"
        readme += f"```\n{next_commands(Path(), evaluates=bool(parsed.eval))}```\n\n"
        readme += "`conf/experiment/mine.yaml` has the settings, `my_rewards.py` rewards of your own.\n"
        files = {
            "conf/experiment/mine.yaml": experiment(parsed, parsed.rows, task),
            "README.md": readme,
            "my_rewards.py": REWARDS,
            ".gitignore": "outputs/\n__pycache__/\n",
        }
        written = write_folder(folder, files)
        sys.stdout.write(f"wrote {', '.join(str(folder / name) for name in written)}\n")
        if kept := [str(folder / name) for name in files if name not in written]:
            sys.stdout.write(f"kept as they are: {', '.join(kept)}\n")
        sys.stdout.write(f"\nnext:\n{commands}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rlmed.init", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("mine"), help="where to write (default: mine)")
    parser.add_argument("--data", type=Path, help="file of rows to learn from, JSON Lines")
    parser.add_argument("--eval", type=Path, nargs="*", help="files of rows to evaluate on")
    parser.add_argument("--model", help=f"folder in Hugging Face format, or hub name (default: {TINY})")
    parser.add_argument("--gpu-memory", metavar="GIB", help=f"of the GPU: {MEMORY}")
    parser.add_argument("--task", choices=TASKS, help="task of the rows, to be checked (default: as they say)")
    parser.add_argument("--yes", action="store_true", help="ask nothing, take the defaults")
    return parser.parse_args(arguments)


def _ask(parsed: argparse.Namespace) -> argparse.Namespace:
    """Fill in what was not given, from the terminal or by default; add the rows of `--data`.

    Raises:
        ValueError: for a mistake; in the terminal, the question is asked again.
    """
    asks = sys.stdin is not None and sys.stdin.isatty() and not parsed.yes

    def settled(given: Value | None, question: str, default: str, read: Callable[[str], Value]) -> Value:
        while given is None and asks:
            try:
                return read(_answer(question, default))
            except ValueError as error:
                sys.stderr.write(f"{error}\n")
        return read(default) if given is None else given

    memory = None if parsed.gpu_memory is None else _memory(parsed.gpu_memory)
    given = None if parsed.data is None else _data(str(parsed.data))
    parsed.data, parsed.rows = settled(given, "file of rows to learn from, JSON Lines", "", _data)
    check_evaluated(parsed.eval or [])
    parsed.eval = settled(parsed.eval, "files to evaluate on, with spaces between", "", _evals)
    parsed.model = settled(parsed.model, "model: folder or hub name", TINY, _model)
    parsed.gpu_memory = settled(memory, "GiB of the GPU (24, 48, 80, …, 8x80; none for the CPU)", "none", _memory)
    return parsed


def _answer(question: str, default: str) -> str:
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:
        sys.stdout.write("\n")
        raise EOFError("the input ended: give --data and the others as flags, or --yes") from None


def _data(said: str) -> tuple[Path, tuple[Example, ...]]:
    if not said:
        raise ValueError("--data is missing: give the file of rows to learn from, JSON Lines (docs/data.md)")
    path = Path(said).expanduser()
    return path, rows_of(path, "--data")


def _evals(said: str) -> list[Path]:
    paths = [Path(said)] if Path(said).is_file() else [Path(name).expanduser() for name in shlex.split(said)]
    check_evaluated(paths)
    return paths


def _model(said: str) -> str:
    path = Path(said).expanduser()
    if said.startswith(("/", ".", "~")) and not path.is_dir():
        raise ValueError(f"--model {said}: folder not found: correct the path")
    return str(path) if path.is_dir() else said


def _memory(said: str) -> str:
    gpus_of(said)
    return said


if __name__ == "__main__":
    main()
