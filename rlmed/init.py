"""Write a configuration of your own: `python -m rlmed.init DIR --data rows.jsonl --model FOLDER`.

It asks for what is not given, chooses the largest settings that fit the GPU, and says how to go on.
"""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from rlmed.core.config.composing import compose_config
from rlmed.core.config.overrides import quoted
from rlmed.core.files.atomic import replace_text
from rlmed.core.process.display import ending_errors, keep_display
from rlmed.core.process.starting import loading_libraries
from rlmed.core.types import Example
from rlmed.data.examples import format_skips, read_examples

TINY = "embedded:tiny_base"
MEMORY = ("24", "48", "80", "8x80", "none")
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
        inside = ", ".join(sorted(entry.name for entry in path.glob("*.jsonl"))) or "none"
        raise ValueError(f"{flag} {path} is a folder: give a file of rows, JSON Lines (there: {inside})")
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
    gpus, _, size = arguments.gpu_memory.rpartition("x")
    memory = None if arguments.gpu_memory == "none" else float(size)
    found = fit(overrides, gpu_gib=memory, gpus=int(gpus or 1))
    per_step = compose_config("train", overrides).algo.groups_per_step
    keys = {
        "name": "mine",
        "steps": math.ceil(EPOCHS * len(rows) / per_step),
        "model.path": path,
        "data.train": train,
        "data.eval": evals,
        **lengths,
        **found.keys,
    } | ({"model.dtype": "bfloat16"} if memory else {})
    groups = {"data": "jsonl", "reward": reward} | found.groups
    defaults = "".join(f"  - override /{group}: {option}\n" for group, option in groups.items())
    where = "this machine" if memory is None else f"GPUs of {arguments.gpu_memory} GiB"
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


def write_folder(folder: Path, files: dict[str, str]) -> None:
    """Write new files.

    Raises:
        ValueError: if one exists already; none is written then.
    """
    if existing := [name for name in files if (folder / name).exists()]:
        raise ValueError(f"{folder / existing[0]} exists already: choose another folder, or remove it")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        replace_text(folder / name, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask for what is missing, write the folder, print the next commands."""
    keep_display()
    with ending_errors():
        parsed = _ask(_parse(arguments))
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
        write_folder(folder, files)
        sys.stdout.write(f"wrote {', '.join(str(folder / name) for name in files)}\n\nnext:\n{commands}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rlmed.init", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("mine"), help="where to write (default: mine)")
    parser.add_argument("--data", type=Path, help="file of rows to learn from, JSON Lines")
    parser.add_argument("--eval", type=Path, nargs="*", help="files of rows to evaluate on")
    parser.add_argument("--model", help=f"folder in Hugging Face format, or hub name (default: {TINY})")
    parser.add_argument("--gpu-memory", choices=MEMORY, help="GiB of the GPU; none for this machine's CPU")
    parser.add_argument("--task", choices=TASKS, help="task of the rows, to be checked (default: as they say)")
    parser.add_argument("--yes", action="store_true", help="ask nothing, take the defaults")
    return parser.parse_args(arguments)


def _ask(parsed: argparse.Namespace) -> argparse.Namespace:
    """Fill in what was not given, from the terminal or by default; add the rows of `--data`."""
    asks = sys.stdin is not None and sys.stdin.isatty() and not parsed.yes

    def answer(question: str, default: str) -> str:
        return (input(f"{question} [{default}]: ").strip() if asks else "") or default

    if parsed.data is None:
        said = answer("file of rows to learn from, JSON Lines", "")
        if not said:
            raise ValueError("--data is missing: give the file of rows to learn from, JSON Lines (docs/data.md)")
        parsed.data = Path(said)
    parsed.rows = rows_of(parsed.data, "--data")  # said before the next question
    if parsed.eval is None:
        said = answer("files to evaluate on, with spaces between", "")
        parsed.eval = [Path(said)] if Path(said).is_file() else [Path(name) for name in shlex.split(said)]
    check_evaluated(parsed.eval)
    parsed.model = parsed.model or answer("model: folder or hub name", TINY)
    parsed.gpu_memory = parsed.gpu_memory or answer(f"memory of the GPU in GiB ({', '.join(MEMORY)})", "none")
    if parsed.gpu_memory not in MEMORY:
        raise ValueError(f"--gpu-memory {parsed.gpu_memory}: choose one of {', '.join(MEMORY)}")
    return parsed


if __name__ == "__main__":
    main()
