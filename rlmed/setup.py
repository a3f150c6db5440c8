"""From a validated configuration to the parts of a run: files, prompts, model."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlmed.core.config import DataConfig, ModelConfig, RunConfig
from rlmed.core.files import ASSETS
from rlmed.core.near_paths import near_path
from rlmed.core.toy import EMBEDDED
from rlmed.core.types import Example
from rlmed.data.jsonl import ReadResult, SkippedRow, format_skips, read_examples
from rlmed.data.leakage import find_leakage
from rlmed.data.leakage_report import LeakageReport, check_no_leakage, doubt_lines, leakage_lines
from rlmed.data.option_order import kept_order_text, kept_orders
from rlmed.data.phantom import write_dataset
from rlmed.data.prompts import PROMPT_FILE, PromptRenderer, load_processor, read_prompt_settings
from rlmed.evaluation import EvalFile
from rlmed.models.agreement import check_agreement, position_doubt
from rlmed.models.policy import load_config

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file as it was read: what can be used and what cannot."""

    name: str
    """File name without its ending."""
    path: Path
    read: ReadResult
    examples: tuple[Example, ...]
    """Rows that also render within the limits."""
    dropped: tuple[SkippedRow, ...]
    """Rows that do not render, for example because the prompt is too long."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Training rows (None where only evaluation was asked for) and the files to evaluate on."""

    train: DataFile | None
    evals: tuple[DataFile, ...]
    leakage: LeakageReport | None = None
    """What the files share; None where there is nothing to compare, or `data.leakage=off`."""

    @property
    def files(self) -> tuple[DataFile, ...]:
        """All files, the training file first."""
        return (*((self.train,) if self.train else ()), *self.evals)

    @property
    def train_examples(self) -> tuple[Example, ...]:
        """Rows to learn from; empty without a training file."""
        return self.train.examples if self.train else ()

    def eval_files(self, limit: int | None = None) -> list[EvalFile]:
        """The evaluation files, at most `limit` rows of each."""
        return [EvalFile(entry.name, entry.examples[:limit]) for entry in self.evals]


def model_folder(path: str) -> Path:
    """Where the model is: `embedded:NAME` ships with the package, everything else is a folder or a hub name.

    Raises:
        ValueError: for an embedded model that does not exist.
    """
    if not path.startswith(EMBEDDED):
        return Path(path)
    folder = ASSETS / path.removeprefix(EMBEDDED)
    if not folder.is_dir():
        raise ValueError(f"model.path={path}: rlmed ships no such model; `make tiny-base` builds tiny_base")
    return folder


def resolve_device(config: ModelConfig) -> torch.device:
    """The device that `model.device` means here.

    Raises:
        ValueError: when a CUDA device is asked for and there is none.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"model.device={config.device}: torch sees no CUDA device here; use model.device=cpu or auto")
    device = torch.device(config.device)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"model.device={config.device}: torch sees {torch.cuda.device_count()} CUDA devices, from cuda:0 on"
        )
    return device


def resolve_dtype(config: ModelConfig) -> str:
    """The dtype that `model.dtype` means here."""
    if config.dtype != "auto":
        return config.dtype
    device = resolve_device(config)
    # on CPUs float32 is the exact choice and the fused one; bfloat16 there has to be asked for
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if native else "float32"


def open_model(folder: Path) -> tuple[PreTrainedTokenizerBase, BaseImageProcessor | None]:
    """Tokenizer and image processor of a model, once its files agree with each other; what was settled is logged.

    Raises:
        ValueError: when there is no such model, or its files are damaged or of several models.
    """
    config = load_config(folder)  # says what to do when there is no such model, before the tokenizer is missed
    tokenizer, image_processor = load_processor(folder)
    for doubt in check_agreement(folder, config, tokenizer, image_processor):
        log.warning("%s", doubt)
    return tokenizer, image_processor


def make_renderer(config: RunConfig) -> PromptRenderer:
    """The prompt renderer of the run's model."""
    folder = model_folder(config.model.path)
    if not folder.is_dir() and not folder.is_absolute():
        log.info("model %s is no folder here: looking for it in the hub's cache and on the hub", folder)
    tokenizer, image_processor = open_model(folder)
    if image_processor is None:
        _warn_of_vision_settings(config)
    renderer = PromptRenderer(
        tokenizer,
        image_processor,
        max_prompt_tokens=config.data.max_prompt_tokens,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
        template=config.prompt.template,
        by_modality=config.prompt.by_modality,
    )
    if doubt := renderer.prefill_doubt():
        log.warning("%s", doubt)
    trained = read_prompt_settings(folder)
    if trained is not None and (trained["template"], trained["by_modality"]) != (
        renderer.template,
        renderer.by_modality,
    ):
        log.warning(
            "model %s was trained with another prompt than this run's: set prompt=NAME as it was then (%s has the text)",
            config.model.path,
            PROMPT_FILE,
        )
    return renderer


def _warn_of_vision_settings(config: RunConfig) -> None:
    """Say which settings are for models that see, where the run's model reads text only."""
    model = config.model
    limits = {"model.min_pixels": model.min_pixels, "model.max_pixels": model.max_pixels}
    idle = [key for key, value in limits.items() if value is not None]
    idle += [f"learner.freeze={part}" for part in config.learner.freeze if part in ("vision", "merger")]
    if idle:
        log.warning("model %s reads text only, which leaves nothing to do for %s", model.path, ", ".join(idle))


def check_positions(config: RunConfig, *, max_tokens: int) -> None:
    """Warn when a longest prompt and `max_tokens` of completion pass the positions that the run's model knows."""
    longest = config.data.max_prompt_tokens
    doubt = position_doubt(
        load_config(model_folder(config.model.path)),
        tokens=longest + max_tokens,
        what=f"data.max_prompt_tokens={longest} and {max_tokens} tokens of a completion",
        cure="data.max_prompt_tokens, rollout.max_tokens or eval.max_tokens",
    )
    if doubt:
        log.warning("%s", doubt)


def load_run_data(config: RunConfig, renderer: PromptRenderer, *, training: bool) -> Dataset:
    """`load_data`, and what is to be said of settings that have nothing to act on, in some rows or in all."""
    data = load_data(config.data, renderer, training=training)
    if data.train and training and config.data.shuffle_options:
        kept, option = kept_orders(example.options for example in data.train_examples)
        if kept:  # of the files that are evaluated, the table says it
            log.info("%s: %s", data.train.path, kept_order_text(kept, len(data.train_examples), option))
    mix = config.data.mix if training else None
    outside = Counter(example.modality for example in data.train_examples if mix and example.modality not in mix)
    if outside:
        log.warning(
            "data.mix leaves out %d of %d training rows: %s",
            outside.total(),
            len(data.train_examples),
            ", ".join(f"{count} of {name or 'no modality'}" for name, count in outside.most_common()),
        )
    shown = {example.modality for file in data.files for example in file.examples}
    templates = config.prompt.by_modality
    if templates and not shown & templates.keys():
        log.warning(
            "prompt.by_modality has templates for %s, and no row is of these: they have %s",
            ", ".join(sorted(templates)),
            ", ".join(repr(name) if name else "none" for name in sorted(shown)),
        )
    return data


def load_data(config: DataConfig, renderer: PromptRenderer, *, training: bool) -> Dataset:
    """Read and check every row that the run will use.

    Raises:
        ValueError: for missing or broken files, when no training file is named although `training`, or for rows in both
            training and evaluation files where `data.leakage=strict`.
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
            log.info("data.eval names no file: generated images are evaluated on (data=phantom)")
        folder = Path(config.phantom_folder or f"outputs/phantom-{config.phantom_seed}")
        log.info("generated questions and pictures (data.phantom_seed=%d) are in %s", config.phantom_seed, folder)
        write_dataset(folder, config.phantom_seed)
        if bool(train) != bool(evals):
            yours, generated = ("data.train", "evaluated") if train else ("data.eval", "training")
            log.warning(
                "%s is yours, and the %s rows are generated: add data=jsonl to use yours alone", yours, generated
            )
        train = train or str(folder / "train_mri.jsonl")
        evals = evals or [str(folder / f"test_{name}.jsonl") for name in ("mri", "ct", "xray")]
    if training and not train:
        raise ValueError(
            "data.train is not set: give a file of training rows, for example data.train=train.jsonl (data=FILE.jsonl names "
            "what is evaluated)"
        )
    if not training and not evals:
        raise ValueError("data.eval is empty: give files to evaluate on, for example data=test.jsonl")
    if config.leakage == "strict" and not train:
        raise ValueError(
            "data.leakage=strict has nothing to compare with: give the rows that the model was trained on, for example "
            "data.train=train.jsonl"
        )
    names = [Path(path).stem for path in evals]
    if len(set(names)) < len(names):
        raise ValueError(
            f"data.eval names files with the same name ({', '.join(names)}): rename one, results go by name"
        )
    data = Dataset(
        train=_load_file(train, config, renderer, config.limit) if train else None,
        evals=tuple(_load_file(path, config, renderer, None) for path in evals),
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


def _load_file(path: str, config: DataConfig, renderer: PromptRenderer, limit: int | None) -> DataFile:
    if not Path(path).exists():
        near = near_path(path)
        cure = f"; {near}" if near else f". {config.download or ''}"
        raise ValueError(f"data file {path} does not exist (relative to {Path.cwd()}){cure}".rstrip())
    read = read_examples(Path(path), on_bad_row=config.on_bad_row)
    if read.skipped:
        log.warning("%s", format_skips(read))
    examples, dropped = _check_renders(read, limit, renderer)
    if dropped:
        first = f"line {dropped[0].line}: {dropped[0].reason}"
        if config.on_bad_row == "error" or not examples:
            raise ValueError(f"{path}: {len(dropped)} of {len(read.examples)} rows cannot be used; {first}")
        log.warning("%s: %d rows dropped, all are listed in data.json; %s", path, len(dropped), first)
    return DataFile(Path(path).stem, Path(path), read, examples, dropped)


def _check_renders(
    read: ReadResult, limit: int | None, renderer: PromptRenderer
) -> tuple[tuple[Example, ...], tuple[SkippedRow, ...]]:
    """Render every example once, so that a bad row is known before the run and not in its middle.

    Returns:
        The examples that render, of the first `limit`, and those that do not, with the reason.
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
