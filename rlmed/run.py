"""One training run: wire the parts, drive the loop, record, evaluate, report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from learner.advantages import AdvantageEstimator, has_learning_signal
from rewards.cache import CACHE_FILE, RewardCache
from rewards.rubric import Rubric
from rewards.slow_parts import SlowRewards
from rewards.task import IouSchedule
from rlmed.cluster.build import Cluster, build_cluster
from rlmed.cluster.engines import make_renderer
from rlmed.cluster.requirements import check_machine
from rlmed.cluster.reward_processes import reward_processes
from rlmed.controller import StepResult, train
from rlmed.core.config.composing import check_same_run, to_mapping, to_yaml
from rlmed.core.config.schema import RunConfig
from rlmed.core.process.closing import closing
from rlmed.core.tracing import Tracer
from rlmed.core.types import SamplingParams
from rlmed.data.images import load_image
from rlmed.data.loading import Dataset, load_run_data
from rlmed.data.stream import PromptStream
from rlmed.evaluation.preflight import PreflightError, check, inspect
from rlmed.evaluation.report_metrics import check_report_metrics
from rlmed.evaluation.results import EvalSummary, evaluated_in, step_folder
from rlmed.evaluation.run import Evaluator
from rlmed.models.loading import check_positions, model_folder
from rlmed.models.tiny.toy import is_toy, toy_note
from rlmed.recording.checkpoint import CheckpointError, Checkpoints, read_state, starting_point
from rlmed.recording.inputs import CONFIG_FILE, check_same_data, write_inputs
from rlmed.recording.loggers.build import build_loggers
from rlmed.recording.progress import Progress
from rlmed.recording.recorder import RunRecorder
from rlmed.recording.restart import remove_earlier_attempt, remove_later_records
from rlmed.report.terminal import show_results
from rollout.buffer import GroupBuffer

log = logging.getLogger(__name__)

OVERLAPPED = ("rollout", "learn", "push_weights")
"""Stages of a step during which Ray workers sample if `algo.max_staleness` is above 0."""


class Run:
    """One training run in one folder: wire the parts, drive the loop, record."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Load everything; nothing is sampled or trained yet.

        Raises:
            ValueError: for unusable data, model or settings.
        """
        self.config, self.folder = config, folder
        config.check_groups()
        check_machine(config, learns=config.debug.learn)
        loggers = build_loggers(folder, config.loggers, config.logging, to_mapping(config), samples=True)
        self.checkpoint = starting_point(folder, resume=config.resume is not None)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep_last)
        self.progress = Progress()
        processes = reward_processes(config)
        self.rubric = Rubric.from_config(
            config.reward.weights,
            config.reward.extra,
            timeout_s=config.reward.timeout_s,
            # bound lazily: an invalid reward is refused before learner and renderer are loaded
            likelihood=(lambda requests: self.cluster.learner.logprobs(requests)) if config.debug.learn else None,
            split_common_prefix=lambda texts: self.renderer.split_common_prefix(texts),
            slow=SlowRewards(
                slow=config.reward.slow,
                judged_by=config.reward.judge,
                cache=RewardCache(folder / CACHE_FILE),
                load_image=load_image,
                embedded_by=config.reward.embedding,
                scored_by=config.reward.radeval,
                processes=processes,
            ),
            iou=IouSchedule.of(config.reward.iou),
        )
        self.renderer = make_renderer(
            config.model, config.data, config.prompt, freeze=config.learner.freeze, checkpoint=self.checkpoint
        )
        check_positions(config.model, config.data, max_tokens=max(config.rollout.max_tokens, config.eval.max_tokens))
        self.data: Dataset = load_run_data(
            config.data, config.prompt, self.renderer, training=True, check=self.rubric.check_tasks
        )
        self._check_rows()
        self.tracer = Tracer(folder / "timeline.jsonl")
        self.recorder = RunRecorder(folder, loggers)
        self.done = 0
        self.cluster: Cluster = build_cluster(
            dataclasses.replace(config, data=self.data.settle_images(config.data)),
            self.renderer,
            folder,
            checkpoint=self.checkpoint,
            on_bad_step=self.recorder.dump_bad_step,
        )
        if processes is not None:
            self.cluster.resources.callback(processes.close)
        try:
            self._prepare()
        except BaseException:
            self.cluster.close()
            raise

    def _check_rows(self) -> None:
        """Check that rewards, normalisation and metrics of evaluations fit the rows."""
        examples = self.data.train_examples
        self.rubric.check_tasks(examples)  # rows with broken images make room for others
        check_report_metrics(self.config.eval, self.data)
        if self.config.algo.normalize_by == "modality" and len({row.modality for row in examples}) == 1:
            log.warning("algo.normalize_by=modality has no effect: all training rows have the same modality, or none")

    def _prepare(self) -> None:
        """Build prompt stream and buffer, restore an earlier state, write the run's first files."""
        config, folder = self.config, self.folder
        sampling = SamplingParams(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            max_tokens=config.rollout.max_tokens,
            stop=config.rollout.stop,
        )
        self.stream = PromptStream(
            self.data.train_examples,
            self.renderer,
            sampling,
            config.data,
            group_size=config.algo.group_size,
            seed=config.seed,
        )
        algo = config.algo
        self.evaluator = Evaluator.of_run(
            config.eval,
            folder,
            self.data,
            self.cluster.evaluation_pool,
            self.renderer,
            stop=config.rollout.stop,
            model=config.model.path,
            on_progress=self.progress.answers,
        )
        self.advantages = AdvantageEstimator(algo.advantage, algo.normalize_by)
        self.buffer = GroupBuffer(
            self.cluster.pool,
            self.stream.request,
            self.rubric.score,
            groups_per_step=algo.groups_per_step,
            max_staleness=algo.max_staleness,
            max_discarded=algo.max_refills * algo.groups_per_step,
            is_kept=lambda scored: (
                not algo.dynamic_sampling or has_learning_signal(scored, mask_truncated=algo.loss.mask_truncated)
            ),
            begin=self.rubric.begin if self.rubric.is_slow else None,
        )
        if self.checkpoint:
            self._restore(self.checkpoint)
        else:
            remove_earlier_attempt(folder)
            self.recorder.truncate({})
        write_inputs(
            folder,
            to_yaml(config),
            self.cluster.model,
            self.data.files,
            self.data.leakage,
            toy=is_toy(model_folder(config.model.path)),
        )

    def execute(self) -> None:
        """Evaluate, train, evaluate, report."""
        # loggers last: each may wait for a server, while workers and devices are free for others
        with closing(self.rubric.close, self.cluster.close, failed=lambda: self.recorder.close(failed=True)):
            self._train()
        self._finish()

    def probe(self, steps: int) -> tuple[list[float], float]:
        """Check the first rollouts, run a few steps; return their seconds, tokens of completions.

        They go on from `load_state`, if that was called. No checkpoint is written; `close` ends it.
        """
        if self.done == 0:
            self._preflight()
        ends, lengths = [time.perf_counter()], [0.0]

        def after_step(result: StepResult) -> None:
            self.stream.observe([*(group.scored for group in result.groups), *result.discarded])
            self.rubric.metrics()
            lengths.append(result.metrics["completion/length"])
            ends.append(time.perf_counter())

        train(
            self.cluster.pool,
            self.cluster.learner,
            self.buffer,
            self.advantages,
            done=self.done,
            steps=self.done + steps,
            tracer=self.tracer,
            after_step=after_step,
        )
        return list(np.diff(ends)), lengths[-1]

    def close(self) -> None:
        """End everything that was started, without results."""
        self.rubric.close()
        self.cluster.close()
        self.tracer.close()
        self.recorder.close()

    def _train(self) -> None:
        config = self.config
        with self.progress, self.checkpoints:
            if not self.data.evals:
                self.progress.message("data.eval is empty: skipping evaluation")
            if self.done == 0:
                self._preflight()
                if config.eval.at_start and self.data.evals:
                    self._evaluate(0, controls=config.eval.controls)
            self.progress.start(config.steps, self.done, self.evaluations())
            train(
                self.cluster.pool,
                self.cluster.learner,
                self.buffer,
                self.advantages,
                done=self.done,
                steps=config.steps,
                tracer=self.tracer,
                after_step=self._after_step,
            )
            if config.eval.at_end and self.data.evals:
                self._evaluate(config.steps, controls=config.eval.controls)

    def load_state(self, checkpoint: Path) -> dict[str, Any]:
        """Go on from a checkpoint of this run, or of another folder's to try it; return its state.

        Raises:
            ValueError: if that run had other settings or data.
        """
        folder = checkpoint.parents[1]
        saved = read_state(checkpoint)
        if "loop" not in saved:
            raise CheckpointError(f"{checkpoint} was written by rlmed.sft: resume it with that command")
        check_same_run(folder / CONFIG_FILE, self.config, unused=("sft",))
        check_same_data(folder, self.data.files)
        loop = saved["loop"]
        self.done = loop["step"]
        self.buffer.restore(loop["cursor"], loop["pending"])
        # earlier versions wrote the running standard deviations of rewards as "spread"
        self.advantages.restore(loop["spread"]["moments"] if "spread" in loop else loop["reward_std"])
        self.stream.restore(saved["stream"])
        self.cluster.learner.load(checkpoint)
        self.cluster.learner.push_weights(self.cluster.pool)
        return saved

    def _restore(self, checkpoint: Path) -> None:
        saved = self.load_state(checkpoint)
        self.recorder.truncate(saved["offsets"])
        remove_later_records(self.folder, self.done)
        evaluates = bool(self.data.evals) and self.config.eval.at_end
        self.progress.resuming(self.done, self.config.steps, checkpoint, evaluates=evaluates)
        if pending := saved["loop"]["pending"]:
            self.progress.message(
                f"{len(pending)} groups were in flight and are sampled again with the current weights: with "
                "algo.max_staleness above 0, a resumed run is not bitwise identical to an uninterrupted one"
            )

    def _preflight(self) -> None:
        if not self.config.preflight.enabled or self.config.debug.recorded:
            return
        with self.tracer.span("preflight", step=0):
            for index in range(self.config.preflight.groups):
                self.cluster.pool.submit(self.stream.request(index))
            groups = [self.cluster.pool.collect() for _ in range(self.config.preflight.groups)]
            for group in groups:
                self.rubric.begin(group)
            scored = [self.rubric.score(group) for group in groups]
            self.rubric.metrics()  # of no step
        weights = {part.name: part.weight for part in self.rubric.parts}
        report = inspect(scored, mask_truncated=self.config.algo.loss.mask_truncated, weights=weights)
        self.progress.message(report.line())
        try:
            check(report, self.config.rollout.max_tokens, self.renderer.end_tokens)
        except PreflightError as error:
            self.recorder.record_refusal(f"{error.cause}.\n{report.line()}.")
            raise

    def _after_step(self, result: StepResult) -> None:
        config, step = self.config, result.step
        seconds = self.tracer.step_seconds(step)
        scored = [*(group.scored for group in result.groups), *result.discarded]
        metrics = result.metrics | self.stream.observe(scored)
        metrics |= {f"seconds/{name}": value for name, value in seconds.items()} | self.rubric.metrics()
        # if rollouts overlap learning, the time spent waiting for them does not measure their speed
        stages = OVERLAPPED if config.cluster.kind == "ray" and config.algo.max_staleness else ("rollout",)
        sampling = sum(seconds.get(name, 0.0) for name in stages)
        sampling -= metrics["seconds/reward"] if self.rubric.is_slow else 0.0  # waiting for a server, say
        metrics["tokens_per_second"] = metrics["completion/tokens"] / max(sampling, 1e-9)
        self.recorder.record_step(step, metrics)
        self.recorder.record_groups(step, result.groups, result.discarded)
        if config.debug.record and result.groups:
            self.recorder.record_batch(step, result.groups)
        self.progress.step(step, metrics)
        self.checkpoints.check()
        self._check_agreement(step, metrics)
        if self.data.evals and config.eval.every and step % config.eval.every == 0 and step < config.steps:
            self._evaluate(step, controls=False)
        if config.debug.learn and (
            (config.checkpoint.every and step % config.checkpoint.every == 0) or step == config.steps
        ):
            self._save(step)

    def _check_agreement(self, step: int, metrics: Mapping[str, float]) -> None:
        limit, mismatch = self.config.rollout.max_mismatch_kl, metrics.get("mismatch_kl", 0.0)
        if limit is not None and not mismatch <= limit:
            raise ValueError(
                f"step {step}: mismatch_kl={mismatch:.3g} exceeds rollout.max_mismatch_kl={limit:g}: the "
                f"{self.config.rollout.engine} engine has different weights from the learner, or lower precision. Continue "
                "from the last checkpoint with resume=auto, or raise the limit"
            )

    def _save(self, step: int) -> None:
        with self.tracer.span("checkpoint", step=step):
            state = {
                "loop": {"step": step, **self.buffer.state(), "reward_std": self.advantages.state()},
                "stream": self.stream.state(),
                "policy_version": self.cluster.learner.policy_version,
                "offsets": self.recorder.offsets(),
                "seed": self.config.seed,
            }
            self.checkpoints.save(step, state, self._secure_model)

    def _secure_model(self, folder: Path) -> Callable[[], None]:
        self.renderer.save(folder)
        return self.cluster.learner.save(folder)

    def evaluations(self) -> dict[int, int]:
        """Return the number of answers of each evaluation to come, by its step."""
        settings, steps = self.config.eval, self.config.steps
        if not self.data.evals:
            return {}
        answers = {controls: self.evaluator.count(controls=controls) for controls in {False, settings.controls}}
        first = evaluated_in(self.evaluator.folder, 0) if self.done else None
        if first is not None:
            self.progress.earlier(first.seconds, answers[settings.controls])
        between = range(settings.every, steps, settings.every) if settings.every else ()
        found = {step: answers[False] for step in between if step > self.done}
        return found | ({steps: answers[settings.controls]} if settings.at_end else {})

    def _evaluate(self, step: int, *, controls: bool) -> EvalSummary:
        with self.tracer.span("evaluate", step=step):
            summary = self.evaluator.evaluate(step, controls=controls)
        self.recorder.record_evaluation(step, summary.accuracies | summary.accuracies_by_task)
        answers = self.evaluator.count(controls=controls)
        self.progress.evaluated(summary.accuracies, step, seconds=summary.seconds, answers=answers)
        return summary

    def _finish(self) -> None:
        """Write the report; print the table and the paths."""
        self.tracer.close()
        self.recorder.close()
        note = "" if self.config.data.source == "phantom" else toy_note(model_folder(self.config.model.path))
        show_results(self.folder, self.config.steps, before=step_folder(self.evaluator.folder, 0), note=note)
