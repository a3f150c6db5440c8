"""One run of supervised fine-tuning, for `rlmed.sft`: batches, steps, evaluations, report."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.packing import PackItem
from learner.supervised import written_item
from rlmed.cluster.commands import Finetuning, build_finetuning
from rlmed.cluster.engines import make_renderer
from rlmed.cluster.requirements import check_machine
from rlmed.core.config.composing import check_same_run, to_mapping, to_yaml
from rlmed.core.config.schema import RunConfig
from rlmed.core.prefill import remaining
from rlmed.core.process.closing import closing
from rlmed.core.tracing import Tracer
from rlmed.core.types import Example
from rlmed.data.curriculum import Curriculum, Visit
from rlmed.data.loading import Dataset, load_run_data
from rlmed.data.prompts import PromptRenderer
from rlmed.data.sampler import shuffle_options
from rlmed.data.stream import SEED_STRIDE
from rlmed.evaluation.report_metrics import check_report_metrics
from rlmed.evaluation.results import evaluated_in, step_folder
from rlmed.evaluation.run import Evaluator, OnProgress
from rlmed.models.loading import check_positions, model_folder
from rlmed.models.tiny.toy import is_toy, toy_note
from rlmed.recording.checkpoint import CheckpointError, Checkpoints, read_state, starting_point
from rlmed.recording.inputs import CONFIG_FILE, check_same_data, write_inputs
from rlmed.recording.loggers.build import build_loggers
from rlmed.recording.progress import Progress
from rlmed.recording.recorder import RunRecorder
from rlmed.recording.restart import remove_earlier_attempt, remove_later_records
from rlmed.report.terminal import show_results
from rlmed.tasks.grounding import Grounding
from rlmed.tasks.registry import task_of

log = logging.getLogger(__name__)


def target_text(example: Example, target: str) -> str:
    """Return the target text of an example.

    "auto" is the row's own completion or, without one, its answer in answer tags (the letter of
    multiple choice); "answer" is always the latter; "option" names the right option before its
    letter, in the format of the prompt, to teach format and letters.
    """
    if target == "auto" and example.completion is not None:
        return example.completion
    if target == "option" and example.is_choice:
        option = example.options[example.answer]
        return f"<think>{option} ({example.letter}).</think>\n<answer>{example.letter}</answer>"
    return f"<answer>{task_of(example).right_answer(example)}</answer>"


class Batches:
    """Batches of target examples as a pure function of the step."""

    def __init__(self, examples: Sequence[Example], renderer: PromptRenderer, config: RunConfig) -> None:
        """Prepare `sft.epochs` passes over `examples` in batches of `sft.batch_size`."""
        self._examples, self._renderer, self._config = examples, renderer, config.sft
        self._curriculum = Curriculum([example.modality for example in examples], config.seed, mix=config.data.mix)
        self._seed, self._shuffle = config.seed, config.data.shuffle_options
        self.steps = math.ceil(config.sft.epochs * len(examples) / config.sft.batch_size)
        texts = {remaining(renderer.prefill, target_text(example, config.sft.target)) for example in examples}
        self.longest = max(len(renderer.completion_ids(text)) for text in texts)
        """Tokens of the longest target."""

        boxes = sum(self._written(example) and example.task == Grounding.name for example in examples)
        if boxes and renderer.templates.box_frame == "pixels":
            log.warning(
                "data.box_frame=pixels: %d of %d training rows have boxes in a completion of their own, which is learnt as it "
                "is; if it is in thousandths, as in generated data, set data.box_frame=thousandths",
                boxes,
                len(examples),
            )
        written = sum(map(self._written, examples))
        if self._shuffle and written:
            log.warning(
                "data.shuffle_options: %d of %d training rows keep the order of their options, since their completions "
                "name letters; sft.target=answer or option replaces these",
                written,
                len(examples),
            )

    def _written(self, example: Example) -> bool:
        """Return True if the target is the row's own completion."""
        return self._config.target == "auto" and example.completion is not None

    def batch(self, step: int) -> list[PackItem]:
        """Return the batch of `step` (from 0)."""
        size = self._config.batch_size
        return [self._item(self._curriculum.visit(index)) for index in range(step * size, (step + 1) * size)]

    def _item(self, visit: Visit) -> PackItem:
        example = self._examples[visit.example]
        if self._shuffle and not self._written(example):
            example = shuffle_options(example, self._seed * SEED_STRIDE + visit.epoch)
        prompt = self._renderer.render(example)
        written = remaining(prompt.prefill, target_text(prompt.example, self._config.target))
        return written_item(prompt, self._renderer.completion_ids(written))


@dataclass(frozen=True, slots=True)
class Opened:
    """What a fine-tuning needs, loaded."""

    config: RunConfig
    checkpoint: Path | None
    renderer: PromptRenderer
    data: Dataset
    batches: Batches
    parts: Finetuning

    def evaluator(self, folder: Path, on_progress: OnProgress | None) -> Evaluator:
        """Return the evaluator of the weights that the pool has."""
        return Evaluator.of_run(
            self.config.eval,
            folder,
            self.data,
            self.parts.pool,
            self.renderer,
            stop=self.config.rollout.stop,
            model=self.config.model.path,
            on_progress=on_progress,
        )


def open_finetuning(config: RunConfig, folder: Path) -> Opened:
    """Load model and data; `parts.resources` closes what was started.

    Raises:
        ValueError: for unusable data, model or settings.
    """
    check_machine(config, learns=True)
    checkpoint = starting_point(folder, resume=config.resume is not None)
    renderer = make_renderer(
        config.model, config.data, config.prompt, freeze=config.learner.freeze, checkpoint=checkpoint
    )
    check_positions(config.model, config.data, max_tokens=config.eval.max_tokens)
    data = load_run_data(config.data, config.prompt, renderer, training=True)
    check_report_metrics(config.eval, data)
    batches = Batches(data.train_examples, renderer, config)
    parts = build_finetuning(
        dataclasses.replace(config, data=data.settle_images(config.data)),
        renderer,
        folder,
        checkpoint=checkpoint,
        steps=batches.steps,
        longest=batches.longest,
    )
    return Opened(config, checkpoint, renderer, data, batches, parts)


def finetune(config: RunConfig, folder: Path) -> None:
    """Run the fine-tuning described by `config` in `folder`."""
    check_machine(config, learns=True)  # before a logger starts
    loggers = build_loggers(folder, config.loggers, config.logging, to_mapping(config), samples=False)
    opened = open_finetuning(config, folder)
    recorder = RunRecorder(folder, loggers)
    # loggers last: each may wait for a server, while ranks and devices are free for others
    with closing(opened.parts.resources.close, failed=lambda: recorder.close(failed=True)):
        _train(opened, folder, recorder)
    recorder.close()
    note = "" if config.data.source == "phantom" else toy_note(model_folder(config.model.path))
    show_results(folder, opened.batches.steps, before=step_folder(folder / "evaluations", 0), note=note)


def _train(opened: Opened, folder: Path, recorder: RunRecorder) -> None:
    """Train with evaluations before and after."""
    config, checkpoint, renderer = opened.config, opened.checkpoint, opened.renderer
    data, batches, parts = opened.data, opened.batches, opened.parts
    learner, progress, tracer = parts.learner, Progress(), Tracer(folder / "timeline.jsonl")
    evaluator = opened.evaluator(folder, progress.answers)
    done = _restore(checkpoint, config, folder, data, parts, recorder)
    answers = evaluator.count(controls=config.eval.controls)
    evaluates, saves = bool(data.evals) and config.eval.at_end, config.checkpoint
    if checkpoint:
        progress.resuming(done, batches.steps, checkpoint, evaluates=evaluates, longer="sft.epochs")
    toy = is_toy(model_folder(config.model.path))
    write_inputs(folder, to_yaml(config), parts.model, data.files, data.leakage, toy=toy)

    def measure(step: int) -> None:
        with tracer.span("evaluate", step=step):
            if step:
                learner.push_weights(parts.pool)
            summary = evaluator.evaluate(step, controls=config.eval.controls)
        recorder.record_evaluation(step, summary.accuracies | summary.accuracies_by_task)
        progress.evaluated(summary.accuracies, step, seconds=summary.seconds, answers=answers)

    def secure_model(target: Path) -> Callable[[], None]:
        renderer.save(target)
        return learner.save(target)

    with progress, Checkpoints(folder / "checkpoints", saves.keep_last) as checkpoints:
        if not data.evals:
            progress.message("data.eval is empty: skipping evaluation")
        if data.evals and config.eval.at_start and done == 0:
            measure(0)
        first = evaluated_in(evaluator.folder, 0) if done else None
        if first is not None:
            progress.earlier(first.seconds, answers)
        progress.start(batches.steps, done, {batches.steps: answers} if evaluates else {})
        for step in range(done + 1, batches.steps + 1):
            with tracer.span("learn", step=step):
                metrics = learner.step(batches.batch(step - 1))
            metrics["tokens_per_second"] = metrics["tokens"] / max(tracer.step_seconds(step)["learn"], 1e-9)
            recorder.record_step(step, metrics)
            progress.step(step, metrics)
            checkpoints.check()
            if (saves.every and step % saves.every == 0) or step == batches.steps:
                checkpoints.save(step, {"step": step, "offsets": recorder.offsets()}, secure_model)
        if evaluates:
            measure(batches.steps)
    tracer.close()


def _restore(
    checkpoint: Path | None,
    config: RunConfig,
    folder: Path,
    data: Dataset,
    parts: Finetuning,
    recorder: RunRecorder,
) -> int:
    """Restore a checkpoint's state or, without one, clear the records; return the steps done."""
    if checkpoint is None:
        remove_earlier_attempt(folder)
        recorder.truncate({})
        return 0
    saved = load_state(checkpoint, config, data, parts)
    recorder.truncate(saved["offsets"])
    remove_later_records(folder, int(saved["step"]))
    return int(saved["step"])


def load_state(checkpoint: Path, config: RunConfig, data: Dataset, parts: Finetuning) -> dict[str, Any]:
    """Load a checkpoint's weights into the learner; return its state.

    Raises:
        ValueError: if the run of the checkpoint's folder had other settings or data.
    """
    folder, saved = checkpoint.parents[1], read_state(checkpoint)
    if "step" not in saved:
        raise CheckpointError(f"{checkpoint} was written by rlmed.launch: resume it with that command")
    check_same_run(folder / CONFIG_FILE, config, unused=("steps", "algo", "reward", "rollout"))
    check_same_data(folder, data.files)
    parts.learner.load(checkpoint)
    return saved
