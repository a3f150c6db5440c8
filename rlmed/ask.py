"""Ask about images: `python -m rlmed.ask a.png [b.png …] "question" --options a b --model DIR`."""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)  # before torch is imported

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rlmed.core.files.near_paths import near_path
from rlmed.core.parsing import answer_text, evaluated_letter
from rlmed.core.prefill import THINK, THINK_END
from rlmed.core.process.display import ending_errors, keep_display
from rlmed.core.process.starting import loading_libraries
from rlmed.core.types import LETTERS, Example, RolloutRequest, SamplingParams
from rlmed.data.images import MAX_IMAGES, check_image, image_size
from rlmed.data.options.choices import plain_options
from rlmed.data.rows import BadRowError
from rlmed.models.tiny.toy import TOY_NOTE, is_toy
from rlmed.tasks.metrics.sets import parse_set
from rlmed.tasks.registry import settle_tasks, task_named, task_of

log = logging.getLogger(__name__)

_NO_IMAGE = "the task {task} needs an image: name it before the question"


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


def asked_options(texts: Sequence[str]) -> tuple[str, ...]:
    """Strip the options' own letters and return them in letter order.

    Raises:
        ValueError: unless there are 2 to 10 options, none blank or repeated.
    """
    try:
        if not all(text.strip() for text in texts):
            raise BadRowError("one is blank")
        return plain_options(texts)
    except BadRowError as error:
        shown = ", ".join(texts)
        parts = shown.split(",") if len(texts) == 1 else []
        meant = f"; separate them by spaces: --options {shlex.join(map(str.strip, parts))}" if len(parts) > 1 else ""
        raise ValueError(
            f"--options needs 2 to {len(LETTERS)} different texts, got {len(texts)}: {shown} ({error}){meant}"
        ) from error


def ask(arguments: argparse.Namespace) -> tuple[Example, str]:
    """Return the question as the model saw it, and its completion.

    Raises:
        ValueError: for invalid options, an unreadable image or model, a blank image, too many
            images, or an argument without effect.
    """
    if arguments.synonyms and arguments.task == "choice":
        raise ValueError(f"--synonyms {arguments.synonyms} has no effect on --task choice: leave it out")
    settle_tasks(arguments.extra_tasks, arguments.synonyms, key="--extra-tasks")
    asked = _asked(arguments)
    if arguments.seed is not None and arguments.temperature == 0:
        raise ValueError(f"--seed {arguments.seed} has no effect without sampling: add --temperature, or leave it out")
    _check_images(arguments.images, arguments.question)
    with loading_libraries():  # only now: `--help` and errors in the arguments need none
        from transformers.utils.logging import disable_progress_bar

        from rlmed.cluster.engines import recorded_renderer
        from rlmed.models.folder.agreement import position_doubt
        from rlmed.models.loading import model_folder
        from rlmed.models.policy import load_config, load_policy
        from rollout.native.engine import NativeEngine
    disable_progress_bar()  # rlmed has its own
    folder = model_folder(arguments.model)
    renderer = recorded_renderer(folder)
    if arguments.modality:
        _check_modality(arguments, renderer.templates.by_modality)
    if renderer.pictures and not arguments.images and task_named(arguments.task).needs_image:
        raise ValueError(_NO_IMAGE.format(task=arguments.task))
    first, *more = arguments.images or [None]
    example = Example(
        "question", first, arguments.question, modality=arguments.modality, more_images=tuple(more), **asked
    )
    prompt = renderer.render(example)
    sampling = SamplingParams(arguments.temperature, max_tokens=arguments.max_tokens, seed=arguments.seed or 0)
    doubt = position_doubt(
        load_config(folder),
        tokens=len(prompt.token_ids) + sampling.max_tokens,
        what=f"{len(prompt.token_ids)} tokens of the prompt and --max-tokens {sampling.max_tokens}",
        advice="--max-tokens",
    )
    if doubt:
        log.warning("%s", doubt)
    engine = NativeEngine(load_policy(folder), renderer.decode)
    engine.submit(RolloutRequest(index=0, prompt=prompt, group_size=1, sampling=sampling))
    groups = []
    while engine.busy:
        groups += engine.step()
    return prompt.example, groups[0].completions[0].text


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of an example that its task needs.

    Raises:
        ValueError: for an unknown task, or options that it does not take, or a missing image.
    """
    if arguments.task == "choice":
        return {"options": asked_options(arguments.options), "answer": 0}
    task = task_named(arguments.task, "--task")

    try:
        truth = task.read(task.placeholder, arguments.options, lambda: _size(arguments.images, task.name))
        return {"task": task.name, "truth": truth}
    except ValueError as error:
        raise ValueError(f"--task {arguments.task}: {error}") from error


def _size(images: Sequence[Path], task: str) -> tuple[int, int]:
    """Return width and height of the first image.

    Raises:
        ValueError: without one.
    """
    if not images:
        raise ValueError(_NO_IMAGE.format(task=task))
    return image_size(images[0])


def _answer(parsed: argparse.Namespace, example: Example, completion: str) -> str:
    """Return the answer in words."""
    if parsed.task != "choice":
        answer = answer_text(completion)
        if answer and not task_of(example).reads(answer, example.truth):
            return f"(unreadable for the task {example.task}: {answer!r})"
        return answer or f"(none; the model wrote: {completion!r})"
    letter = evaluated_letter(completion)
    if letter is None or letter not in LETTERS[: len(parsed.options)]:
        return f"(no option; the model wrote: {completion!r})"
    return f"{letter}) {asked_options(parsed.options)[LETTERS.index(letter)]}"


def _explained(example: Example, completion: str) -> str:
    """Return what the task says of the answer, such as the units of boxes; mostly ""."""
    answer = answer_text(completion)
    if example.is_choice or not answer or not task_of(example).reads(answer, example.truth):
        return ""
    return task_of(example).explain(answer, example.truth, lambda: _size(example.images, example.task))


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
        check_image(image, keep=True)


def _check_modality(arguments: argparse.Namespace, prompts: Collection[str]) -> None:
    """Warn about a modality without its own prompt.

    Raises:
        ValueError: if no modality has one.
    """
    given = f"--modality {arguments.modality}"
    if not prompts:
        raise ValueError(
            f"{given} has no effect: model {arguments.model} has one prompt for all modalities; leave it out"
        )
    if arguments.modality not in prompts:
        log.warning("%s has no prompt of its own (available: %s); using the general one", given, ", ".join(prompts))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print reasoning and answer; on an error, print one line and exit with status 2."""
    keep_display()
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    with ending_errors():
        example, completion = ask(parsed)
        answer, explained = _answer(parsed, example, completion), _explained(example, completion)
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
