"""Rebuild the embedded base model from scratch: `python -m rlmed.tiny_base` (`make tiny-base`).

Random weights and a tokenizer (`rlmed.models.tiny.build`), generated studies with written readings
(`rlmed.data.phantom.corpus`), and three stages of supervised fine-tuning with `rlmed.sft`: bind
letters to options on text, train the vision part on careful readings, then learn the mixture of
careful and hasty readers that RL starts from.
"""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)  # before torch is imported

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlmed import sft
from rlmed.core.config.composing import compose_config
from rlmed.core.config.schema import RunConfig
from rlmed.core.files.atomic import partial_folder, rename_into_place
from rlmed.core.files.exclusive import hold
from rlmed.core.process.display import ending_errors, keep_display
from rlmed.core.process.starting import loading_libraries
from rlmed.models.tiny.toy import SHIPPED
from rlmed.recording.checkpoint import CheckpointError, list_checkpoints

CORPUS_SEED = 1
"""Seed of the alignment corpus; the experiment's data have their own seeds."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of supervised fine-tuning on one file."""

    name: str
    epochs: float
    dtype: str
    settings: tuple[str, ...]


STAGES = (
    Stage("lookup", 1.0, "float32", ("learner.lr=1e-3", "learner.lr_schedule=constant", "learner.warmup_steps=40")),
    # takes 90 % of the time; the optimizer's master weights are float32 anyway
    Stage("careful", 1.2, "bfloat16", ("learner.lr=1e-3", "learner.lr_schedule=cosine", "learner.warmup_steps=20")),
    Stage("readers", 0.7, "float32", ("learner.lr=4e-4", "learner.lr_schedule=linear", "learner.warmup_steps=20")),
)


def build(target: Path, work: Path, *, lookup_rows: int, studies: int, reader_studies: int) -> None:
    """Train a base model and write it to `target` in bfloat16.

    Args:
        target: folder to replace.
        work: folder for data and runs; an interrupted build resumes from it.
        lookup_rows: text rows.
        studies: images with careful readings.
        reader_studies: images with readings of mixed quality.
    """
    with loading_libraries():  # only now: `--help` needs none
        from transformers.utils.logging import disable_progress_bar

        from rlmed.data.phantom.corpus import tokenizer_corpus, tokenizer_phrases
        from rlmed.models.tiny.build import build_tiny
    disable_progress_bar()  # rlmed has its own
    files = _corpus(work / "data", lookup_rows=lookup_rows, studies=studies, reader_studies=reader_studies)
    model = work / "start"
    build_tiny(model, corpus=tokenizer_corpus(0), phrases=tokenizer_phrases())
    for stage in STAGES:
        folder = work / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        sft.main(_config(stage, files[stage.name], model), folder)
        model = list_checkpoints(folder / "checkpoints")[-1]
    _export(model, target)


def _corpus(folder: Path, *, lookup_rows: int, studies: int, reader_studies: int) -> dict[str, Path]:
    """Write the stages' files; lookup rows among the careful readings preserve the binding."""
    done = folder / "done"
    names = ("lookup", "careful", "readers")
    if not done.is_file():
        from rlmed.data.phantom.corpus import write_alignment

        shutil.rmtree(folder, ignore_errors=True)
        files = write_alignment(
            folder, CORPUS_SEED, lookup_rows=lookup_rows, studies=studies, reader_studies=reader_studies
        )
        with files["careful"].open("a", encoding="utf-8") as careful:
            careful.write(files["lookup"].read_text(encoding="utf-8"))
        done.touch()
    return {name: folder / f"{name}.jsonl" for name in names}


def _config(stage: Stage, train: Path, model: Path) -> RunConfig:
    settings = [
        "data=jsonl",
        f"data.train={train}",
        "data.max_prompt_tokens=256",
        f"model.path={model}",
        f"model.dtype={stage.dtype}",
        f"name=tiny_base_{stage.name}",
        "resume=auto",
        f"sft.epochs={stage.epochs}",
        "sft.batch_size=64",
        "learner.betas=[0.9,0.98]",
        "learner.weight_decay=0.01",
        "checkpoint.every=100",
        *stage.settings,
    ]
    return compose_config("sft", settings)


def _export(model: Path, target: Path) -> None:
    """Save the model in bfloat16: half the size, and precise enough for a base."""
    import torch
    from transformers import AutoModelForImageTextToText

    from rlmed.data.prompts import load_processor

    target = target.resolve()
    aside = partial_folder(target)
    AutoModelForImageTextToText.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(aside)
    tokenizer, pictures = load_processor(model)
    tokenizer.save_pretrained(aside)
    assert pictures is not None
    pictures.image_processor.save_pretrained(aside)
    rename_into_place(aside, target, may_replace=lambda: True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the base model in the package, or in `--target`."""
    parser = argparse.ArgumentParser(prog="python -m rlmed.tiny_base", description=__doc__)
    parser.add_argument("--target", type=Path, default=SHIPPED / "tiny_base")
    parser.add_argument("--work", type=Path, default=Path("outputs/tiny_base"))
    parser.add_argument("--lookup-rows", type=int, default=4000)
    parser.add_argument("--studies", type=int, default=26000)
    parser.add_argument("--reader-studies", type=int, default=3000)
    parsed = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    keep_display()
    with ending_errors(CheckpointError, interrupted="interrupted; run the same command to continue"):
        parsed.work.mkdir(parents=True, exist_ok=True)
        with hold(parsed.work, advice="wait until it has ended, or choose another folder with --work"):
            build(
                parsed.target,
                parsed.work,
                lookup_rows=parsed.lookup_rows,
                studies=parsed.studies,
                reader_studies=parsed.reader_studies,
            )


if __name__ == "__main__":
    main()
