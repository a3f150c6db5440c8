"""Build and align a vision-language model around a text model; see `rlmed.smol_base`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from rlmed import sft
from rlmed.core.config.composing import compose_config
from rlmed.core.config.overrides import quoted
from rlmed.core.config.schema import RunConfig
from rlmed.core.files.atomic import partial_folder, rename_into_place, replace_text
from rlmed.core.files.damage import read_json
from rlmed.data.phantom.anatomy import Study
from rlmed.data.phantom.reports import LINE, all_lines, all_studies, studies_of, visual_lines, write_readings
from rlmed.data.pictures import Pictures
from rlmed.data.prompts import load_processor
from rlmed.models.smol.text import check_target, is_model, write_text_model
from rlmed.models.smol.vlm import build_vlm
from rlmed.models.smol.words import teach_words
from rlmed.models.tiny.toy import SHIPPED
from rlmed.recording.checkpoint import STATE_FILE, list_checkpoints
from rlmed.recording.progress import Progress

SEED = 1
"""Seed of the alignment's studies; the experiment's data have their own seeds."""
READERS_SEED = 2
"""Seed of the studies that the readers see."""
TEST_SEED, TEST = 99, 300
"""New pictures, on which the words are tested."""
BATCH = 32
SETTINGS_FILE = "settings.json"
"""In the folder of the work: the settings with which it was begun."""
FILLER = "\n"
"""What visual tokens say behind the end of a text."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of supervised fine-tuning; `hasty` is the share of hasty readers."""

    name: str
    hasty: float
    settings: tuple[str, ...]


STAGES = (
    Stage(
        "careful",
        0.0,
        ("learner.freeze=[vision,merger]", "learner.lr=4e-4", "learner.lr_schedule=linear", "learner.warmup_steps=10"),
    ),
    Stage("readers", 0.65, ("learner.lr=2e-4", "learner.lr_schedule=linear", "learner.warmup_steps=2")),
)


def build(
    target: Path, work: Path, text: Path | None, *, word_steps: int, careful: int, readers: int, dtype: str = "bfloat16"
) -> None:
    """Build and align the vision-language model, and write it to `target` in bfloat16.

    Args:
        target: folder to replace.
        work: folder for data and runs; an interrupted build resumes from it.
        text: folder of the text model; None builds it from the installed packages.
        word_steps: steps of the first stage, of 32 pictures.
        careful: rows of the second stage.
        readers: rows of the third.
        dtype: of fine-tuning.

    Raises:
        ValueError: without the packages, for settings that cannot be used or with which `work` was
            not begun, or if `target` holds anything but a model.
    """
    # before hours of training
    check_target(target)
    numbers = {"--word-steps": word_steps, "--careful": careful, "--readers": readers}
    _check(work, {"--text": text, **numbers, "--dtype": dtype})
    disable_progress_bar()  # rlmed has its own
    if text is None:
        text = work / "text"
        if not text.is_dir():
            write_text_model(text)
    model = work / "words"
    if not model.is_dir():
        aside = partial_folder(model)
        build_vlm(text, SHIPPED / "tiny_base", aside)
        _say_words(aside, word_steps)
        Progress().message(f"what visual tokens say of {TEST} new pictures is right: {_seeing(aside)}")
        rename_into_place(aside, model, may_replace=lambda: False)
    for stage, rows, start in zip(STAGES, (careful, readers), (0, careful), strict=True):
        file = work / "data" / f"{stage.name}.jsonl"
        if not file.is_file():
            drawn = studies_of(READERS_SEED, start, rows)
            drawn = _as_seen(model, drawn) if stage.name == "careful" else drawn
            write_readings(work / "data", stage.name, SEED, drawn, hasty=stage.hasty)
        folder = work / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        sft.main(_config(stage, file, model, dtype), folder)
        model = list_checkpoints(folder / "checkpoints")[-1]
    _export(model, target)


def _check(work: Path, settings: Mapping[str, Any]) -> None:
    """Check the settings of a build; record them in `work`, or compare them with what is there."""
    text = settings["--text"]
    if text is not None and not is_model(text):
        raise ValueError(f"--text {text} is no model folder (it has no config.json): give that of a Llama model")
    for name, value in settings.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} {value}: give a positive number")
    for stage in STAGES:
        _config(stage, work, work, settings["--dtype"])
    recorded = {name: value if isinstance(value, int) else str(value) for name, value in settings.items()}
    path = work / SETTINGS_FILE
    begun = read_json(path) if path.is_file() else recorded
    if begun != recorded:
        other = ", ".join(f"{name} {begun.get(name)}" for name in recorded if begun.get(name) != recorded[name])
        raise ValueError(f"{work} was begun with {other}: build with that, or in another folder with --work")
    replace_text(path, json.dumps(recorded, indent=2) + "\n")


def _say_words(folder: Path, steps: int) -> None:
    """Train tower and merger of the model in `folder`, in place."""
    tokenizer, pictures = load_processor(folder)
    assert pictures is not None
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    spoken: dict[str, list[int]] = {line: _line(tokenizer, line) for line in all_lines()}

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        drawn = studies_of(SEED, step * BATCH, BATCH)
        pixels, grids = _pixels(pictures, [picture for _, picture in drawn])
        return pixels, grids, torch.tensor([_words(study, spoken) for study, _ in drawn])

    words = [token for line in spoken.values() for token in line]
    with Progress() as progress:
        progress.start(steps, 0)
        teach_words(
            model,
            batch,
            steps,
            words=words,
            lr=1e-3,
            on_step=lambda step, loss, _: progress.step(step + 1, {"loss": loss}),
        )
    model.save_pretrained(folder)


def _seeing(folder: Path) -> str:
    """Return the share of new pictures of which visual tokens say the truth, by property."""
    drawn = studies_of(TEST_SEED, 0, TEST)
    pairs = [(study, seen) for (study, _), (seen, _) in zip(drawn, _as_seen(folder, drawn), strict=True)]
    return ", ".join(
        f"{name} {sum(getattr(study, name) == getattr(seen, name) for study, seen in pairs) / TEST:.1%}"
        for name in ("technique", "region", "lesion", "size", "quadrant")
    )


def _as_seen(folder: Path, drawn: Sequence[tuple[Study, Image.Image]]) -> list[tuple[Study, Image.Image]]:
    """Return for each picture the study that its visual tokens tell: that of the nearest words."""
    tokenizer, pictures = load_processor(folder)
    assert pictures is not None
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    table = model.get_input_embeddings().weight.detach()
    lines = all_lines()
    words = table[torch.tensor([_line(tokenizer, line) for line in lines])]  # [lines, LINE, H]
    place = {line: index for index, line in enumerate(lines)}
    studies = [*all_studies()]
    told = torch.tensor([[place[line] for line in visual_lines(study)] for study in studies])  # [studies, rows]
    seen = []
    for _, picture in drawn:
        pixels, grids = _pixels(pictures, [picture])
        with torch.inference_mode():
            rows = model.model.visual(pixels, grid_thw=grids).pooler_output.view(-1, 1, LINE, table.shape[1])
        distance = (rows - words).square().sum((-1, -2))  # [rows, lines]
        best = distance.gather(1, told.T).sum(0).argmin()
        seen.append((studies[int(best)], picture))
    return seen


def _pixels(pictures: Pictures, drawn: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return pixel values [P, D] and grids [B, 3] of drawn pictures."""
    inputs = [pictures.prepare([picture]).inputs for picture in drawn]
    return tuple(
        torch.from_numpy(np.concatenate([of_one[name] for of_one in inputs]))
        for name in ("pixel_values", "image_grid_thw")
    )  # type: ignore[return-value]


def _line(tokenizer: Any, line: str) -> list[int]:
    """Return a line's words as `LINE` tokens."""
    tokens = tokenizer(line, add_special_tokens=False)["input_ids"][:LINE]
    filler = tokenizer(FILLER, add_special_tokens=False)["input_ids"][:1]
    return [*tokens, *filler * (LINE - len(tokens))]


def _words(study: Study, spoken: dict[str, list[int]]) -> list[int]:
    return [token for line in visual_lines(study) for token in spoken[line]]


def _config(stage: Stage, train: Path, model: Path, dtype: str) -> RunConfig:
    settings = [
        "data=jsonl",
        f"data.train={quoted(str(train), commas=False)}",
        "data.max_prompt_tokens=256",
        "prompt=short",
        f"model.path={quoted(str(model), commas=False)}",
        f"model.dtype={dtype}",
        f"name=smol_base_{stage.name}",
        "resume=auto",
        "sft.epochs=1",
        "sft.batch_size=16",
        "learner.betas=[0.9,0.98]",
        "learner.weight_decay=0.01",
        "learner.token_budget=2048",
        "checkpoint.every=50",
        "checkpoint.keep_last=1",
        *stage.settings,
    ]
    return compose_config("sft", settings)


def _export(model: Path, target: Path) -> None:
    """Save the model in bfloat16, with its tokenizer, image processor and prompt."""
    target = target.resolve()
    aside = partial_folder(target)
    AutoModelForImageTextToText.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(aside)
    for file in model.iterdir():
        wanted = file.suffix in (".json", ".jinja") and file.name != STATE_FILE
        if wanted and not (aside / file.name).exists():
            shutil.copyfile(file, aside / file.name)
    if not rename_into_place(aside, target, may_replace=lambda: is_model(target)):
        raise ValueError(f"{target} exists and is no model folder: the new one is {aside}")
