"""Load the rows of a run: read, check and render every file once before the first step."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlmed.core.config.schema import DataConfig, PromptConfig
from rlmed.core.files.near_paths import near_path
from rlmed.core.types import Example
from rlmed.data.examples import ReadResult, SkippedRow, format_skips, read_examples
from rlmed.data.leakage.findings import LeakageReport, check_no_leakage, doubt_lines, leakage_lines
from rlmed.data.leakage.search import find_leakage
from rlmed.data.options.order import kept_order_text, kept_orders
from rlmed.data.phantom.studies import write_dataset
from rlmed.data.phantom.tasks import write_task_dataset
from rlmed.data.prompts import PromptRenderer
from rlmed.data.rows import grouped

log = logging.getLogger(__name__)

CheckRows = Callable[[Sequence[Example]], None]


@dataclass(frozen=True)
class EvalFile:
    """Rows whose accuracy is reported together.

    Example:
        EvalFile("ct", examples) with 300 examples of distinct ids.
    """

    name: str
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file as read: its usable rows and the others."""

    name: str
    """File name without its suffix."""
    path: Path
    read: ReadResult
    examples: tuple[Example, ...]
    """Usable rows that also render within the limits."""
    dropped: tuple[SkippedRow, ...]
    """Rows that do not render, for example because the prompt is too long."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Training rows (None for an evaluation alone) and the files to evaluate on."""

    train: DataFile | None
    evals: tuple[DataFile, ...]
    leakage: LeakageReport | None = None
    """What the files share; None if there is nothing to compare, or with `data.leakage=off`."""

    @property
    def files(self) -> tuple[DataFile, ...]:
        """Return all files, the training file first."""
        return (*((self.train,) if self.train else ()), *self.evals)

    @property
    def train_examples(self) -> tuple[Example, ...]:
        """Return the rows to learn from; empty without a training file."""
        return self.train.examples if self.train else ()

    def settle_images(self, config: DataConfig) -> DataConfig:
        """Set `max_images` to the most that a row has, or 1: engines and estimates go by it."""
        most = max((len(example.images) for file in self.files for example in file.examples), default=1)
        return dataclasses.replace(config, max_images=max(1, most))

    def eval_files(self, limit: int | None = None) -> list[EvalFile]:
        """Return the evaluation files, at most `limit` rows of each."""
        return [EvalFile(entry.name, entry.examples[:limit]) for entry in self.evals]


def load_run_data(
    config: DataConfig,
    prompt: PromptConfig,
    renderer: PromptRenderer,
    *,
    training: bool,
    check: CheckRows | None = None,
) -> Dataset:
    """Call `load_data`, and warn of settings that have no effect on some rows or on all."""
    data = load_data(config, renderer, training=training, check=check)
    if data.train and training and config.shuffle_options:
        kept, option = kept_orders(example.options for example in data.train_examples if example.is_choice)
        if kept:  # for evaluated files, the results table says so
            log.info("%s: %s", data.train.path, kept_order_text(kept, len(data.train_examples), option))
    mix = config.mix if training else None
    outside = Counter(example.modality for example in data.train_examples if mix and example.modality not in mix)
    if outside:
        log.warning(
            "data.mix leaves out %d of %d training rows: %s",
            outside.total(),
            len(data.train_examples),
            ", ".join(f"{count} of {name or 'no modality'}" for name, count in outside.most_common()),
        )
    shown = {example.modality for file in data.files for example in file.examples}
    templates = prompt.by_modality
    if templates and not shown & templates.keys():
        log.warning(
            "prompt.by_modality has templates for %s, but no row is of these: they have %s",
            ", ".join(sorted(templates)),
            ", ".join(repr(name) if name else "none" for name in sorted(shown)),
        )
    return data


def load_data(
    config: DataConfig, renderer: PromptRenderer, *, training: bool, check: CheckRows | None = None
) -> Dataset:
    """Read and check every row that the run uses.

    Args:
        config: the files.
        renderer: of their prompts.
        training: whether the run learns from `config.train`.
        check: called with the rows to learn from, or of each file to evaluate on, before their
            images are decoded; raises ValueError for rows that the run cannot use.

    Raises:
        ValueError: for missing or broken files, without a training file if `training`, or for rows
            in both training and evaluation files with `data.leakage=strict`.
    """
    train, evals = config.train, list(config.eval)
    if config.source == "phantom" and train and evals:
        log.warning(
            "data.train and data.eval name files, and data=phantom is for generated images, with its "
            "data.max_prompt_tokens=%d: set data=jsonl",
            config.max_prompt_tokens,
        )
    elif config.source == "phantom":
        if train and training:
            log.info("data.eval names no file: evaluating on generated images (data=phantom)")
        generated = _generate(config)
        if bool(train) != bool(evals):
            yours, others = ("data.train", "evaluated") if train else ("data.eval", "training")
            log.warning("%s is yours, and the %s rows are generated: add data=jsonl to use yours alone", yours, others)
        train = train or str(generated[0])
        evals = evals or [str(path) for path in generated[1:]]
    if training and not train:
        raise ValueError(
            "data.train is not set: give a file of training rows, for example data=jsonl data.train="
            f"{evals[0] if len(evals) == 1 else 'train.jsonl'} (data=FILE.jsonl names rows to evaluate on)"
        )
    if not training and not evals:
        raise ValueError("data.eval is empty: give files to evaluate on, for example data=test.jsonl")
    if config.leakage == "strict" and not train:
        raise ValueError(
            "data.leakage=strict has nothing to compare with: give the rows that the model was trained on, for example "
            "data.train=train.jsonl"
        )
    check_names(evals)
    data = Dataset(
        train=_load_file(train, config, renderer, config.limit, check if training else None) if train else None,
        evals=tuple(_load_file(path, config, renderer, None, None if training else check) for path in evals),
    )
    if config.leakage == "off" or not data.train_examples or not data.evals:
        return data
    report = find_leakage(data.train_examples, {file.name: file.examples for file in data.evals})
    if config.leakage == "strict":
        check_no_leakage(report)
    for line in leakage_lines(report):
        log.warning("%s; all are listed in data.json", line)
    for line in doubt_lines(report):
        log.info("%s", line)
    return dataclasses.replace(data, leakage=report)


def check_names(paths: Sequence[str], key: str = "data.eval") -> None:
    """Check that the files to evaluate on differ in name: results go by name.

    Raises:
        ValueError: if two have the same; `key` is where they were given.
    """
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"{key} names files with the same name ({', '.join(names)}): rename one, results go by name")


def _generate(config: DataConfig) -> list[Path]:
    """Write the generated rows unless they are there; return the training file, then the others."""
    task = config.task
    folder = Path(config.phantom_folder or f"outputs/phantom-{config.phantom_seed}" + (f"-{task}" if task else ""))
    log.info("generated questions and pictures (data.phantom_seed=%d) are in %s", config.phantom_seed, folder)
    if task:
        write_task_dataset(folder, config.phantom_seed, [task])
    else:
        write_dataset(folder, config.phantom_seed)
    names = (f"train_{task}", f"test_{task}") if task else ("train_mri", "test_mri", "test_ct", "test_xray")
    return [folder / f"{name}.jsonl" for name in names]


def _load_file(
    path: str, config: DataConfig, renderer: PromptRenderer, limit: int | None, check: CheckRows | None
) -> DataFile:
    if not Path(path).exists():
        if path[:1] == "[" and path[-1:] == "]" and path == config.train:
            raise ValueError(f"data.train={path}: it is one file, not a list: join them, as with cat A B > train.jsonl")
        near = near_path(path)
        advice = f"; {near}" if near else f". {config.download or ''}"
        raise ValueError(f"data file {path} does not exist (relative to {Path.cwd()}){advice}".rstrip())
    used = None if check is None else lambda rows: check(rows[:limit])
    read = read_examples(Path(path), on_bad_row=config.on_bad_row, check=used)
    if read.skipped:
        log.warning("%s", format_skips(read))
    examples, dropped = _check_renders(read, limit, renderer)
    if dropped:
        first = "; ".join(grouped([(f"line {row.line}", row.reason) for row in dropped])[:3])
        if config.on_bad_row == "error" or not examples:
            raise ValueError(f"{path}: {len(dropped)} of {len(read.examples)} rows cannot be used; {first}")
        log.warning("%s: %d rows dropped, all are listed in data.json; %s", path, len(dropped), first)
    return DataFile(Path(path).stem, Path(path), read, examples, dropped)


def _check_renders(
    read: ReadResult, limit: int | None, renderer: PromptRenderer
) -> tuple[tuple[Example, ...], tuple[SkippedRow, ...]]:
    """Render every example once, so that a bad row shows up before the run and not in its middle.

    Returns:
        The examples among the first `limit` that render, and those that do not, with the reason.
    """
    kept, dropped = [], []
    for example in read.examples[:limit]:
        try:
            renderer.render(example)
        except ValueError as error:
            dropped.append(SkippedRow(read.lines[example.id], example.id, str(error)))
        else:
            kept.append(example)
    return tuple(kept), tuple(dropped)
