"""Ask about images: `python -m rlmed.ask a.png [b.png …] "question" --options a b --model DIR`."""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)  # before torch is imported

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlmed.core.files.near_paths import near_path
from rlmed.core.parsing import answer_text
from rlmed.core.prefill import THINK, THINK_END
from rlmed.core.process.display import ending_errors, keep_display
from rlmed.core.process.starting import loading_libraries
from rlmed.core.types import Example, SamplingParams
from rlmed.data.asking import answer_explained, answer_in_words, asked_example, check_modality, check_pictured
from rlmed.data.images import MAX_IMAGES, check_image, volume_kind
from rlmed.models.tiny.toy import TOY_NOTE, is_toy
from rlmed.tasks.metrics.sets import parse_set
from rlmed.tasks.registry import settle_tasks, task_named

log = logging.getLogger(__name__)

_NAME_IT = "name it before the question"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m rlmed.ask", description="Ask a model about one image or several.")
    parser.add_argument(
        "images",
        type=Path,
        nargs="*",
        metavar="image",
        help="PNG, JPEG or any other picture file; several in the order in which the model is to see them; none for a "
        "text model",
    )
    parser.add_argument("question", help="its text, in quotes")
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="2 to 10 answers to choose from; of labels, all possible",
    )
    parser.add_argument(
        "--task",
        default="choice",
        metavar="NAME",
        help="choice (default, with --options), open, grounding, labels or report, or one of --extra-tasks: for models "
        "trained on it; boxes are printed as the model writes them, and in pixels of the first image file",
    )
    parser.add_argument("--extra-tasks", nargs="+", default=[], metavar="MODULE:CLASS", help="as data.extra_tasks")
    parser.add_argument("--synonyms", metavar="FILE", help="as data.synonyms: also says which of its terms is meant")
    parser.add_argument(
        "--modality", default="", metavar="NAME", help="MRI, CT, …: for models trained with one prompt per modality"
    )
    parser.add_argument(
        "--model",
        default="embedded:tiny_base",
        metavar="DIR",
        help="model folder, for example outputs/run/DATE/checkpoints/step-000300 (default: the embedded model, which "
        "knows generated images only)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the most likely tokens"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="sampling seed, with a temperature above 0 (default: 0)")
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="longest reasoning and answer (default: 512)"
    )
    return parser.parse_args(arguments)


def ask(arguments: argparse.Namespace) -> tuple[Example, str]:
    """Return the question as the model saw it, and its completion.

    Raises:
        ValueError: for invalid options, an unreadable image or model, a blank image, too many
            images, or an argument without effect.
    """
    if arguments.synonyms and arguments.task == "choice":
        raise ValueError(f"--synonyms {arguments.synonyms} has no effect on --task choice: leave it out")
    settle_tasks(arguments.extra_tasks, arguments.synonyms, key="--extra-tasks")
    example = asked_example(
        arguments.images,
        arguments.question,
        arguments.options,
        task=arguments.task,
        modality=arguments.modality,
        flag="--",
        advice=_NAME_IT,
    )
    if arguments.seed is not None and arguments.temperature == 0:
        raise ValueError(f"--seed {arguments.seed} has no effect without sampling: add --temperature, or leave it out")
    _check_images(arguments.images, arguments.question)
    with loading_libraries():  # only now: `--help` and errors in the arguments need none
        from rlmed.cluster.asking import AskedModel
    model = AskedModel(arguments.model)
    prompts = model.renderer.templates.by_modality
    if doubt := check_modality(arguments.modality, prompts, model=arguments.model, flag="--"):
        log.warning("%s", doubt)
    if model.renderer.pictures:
        check_pictured(example, _NAME_IT)
    prompt = model.render(example)
    sampling = SamplingParams(arguments.temperature, max_tokens=arguments.max_tokens, seed=arguments.seed or 0)
    if passed := model.doubt(prompt, sampling.max_tokens, "--"):
        log.warning("%s", passed)
    written = [text for text, completion in model.sample(prompt, sampling) if completion]
    return prompt.example, written[-1]


def _meant(parsed: argparse.Namespace, completion: str) -> str:
    """Return the answer in the terms of the file of synonyms; "" without one, or if none occurs."""
    synonyms = task_named(parsed.task).synonyms
    terms = parse_set(answer_text(completion) or "", parsed.options, synonyms)
    return ", ".join(terms) if {*terms} & {*synonyms.values()} else ""


def _check_images(images: Sequence[Path], question: str) -> None:
    """Check each image, and that the question is none.

    Raises:
        ValueError: for a missing, unreadable or blank image, too many of them, or no question.
    """
    if os.path.isfile(question):  # not Path.is_file, which raises for an overlong name
        raise ValueError(f"the question {question!r} is a file: write the question after the last image, in quotes")
    if len(images) > MAX_IMAGES:
        raise ValueError(f"{len(images)} images are more than {MAX_IMAGES}: choose among them")
    for image in images:
        if near := near_path(image):
            raise ValueError(f"image {image} does not exist: {near}")
        if kind := _kind(image):
            raise ValueError(f"image {image} is a {kind} file: the page Ask of python -m rlmed.studio reads it")
        check_image(image, keep=True)


def _kind(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return volume_kind(stream)
    except OSError:
        return ""  # `check_image` says what is wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """Print reasoning and answer; on an error, print one line and exit with status 2."""
    keep_display()
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    with ending_errors():
        example, completion = ask(parsed)
        answer, explained = answer_in_words(example, completion), answer_explained(example, completion)
        from rlmed.models.loading import model_folder

        toy = is_toy(model_folder(parsed.model))
    console = Console(highlight=False)
    reasoning, closed, _ = completion.partition(THINK)[2].partition(THINK_END)
    console.print(Text.assemble(("reasoning  ", "bold"), (reasoning.strip() if closed else "") or "(none)"))
    console.print(Text.assemble(("answer     ", "bold"), answer))
    if explained:
        console.print(Text.assemble(("that is    ", "bold"), explained))
    if meant := _meant(parsed, completion):
        console.print(Text.assemble(("means      ", "bold"), meant))
    if toy:
        console.print(Text.assemble(("note       ", "bold"), TOY_NOTE), soft_wrap=True)
    console.print(Text("For research only, not for clinical use.", style="dim"))


if __name__ == "__main__":
    main()
