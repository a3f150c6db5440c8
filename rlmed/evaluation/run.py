"""Evaluate accuracy on held-out files, with controls that show how much comes from the picture.

Each question is answered greedily: unchanged and, as controls, on a grey picture, on the picture of
another question of its file, and with its options reordered, unless one refers to others (`all of
the above`); a question about several pictures also with one of them grey, and with all in another
order. Image-free baselines complete the figures: chance, the majority letter, the prior of option
texts.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from rlmed.core.config.running import EvalConfig
from rlmed.core.parsing import has_answer_format, has_format
from rlmed.core.prefill import opens_thinking
from rlmed.core.protocols import RolloutPool
from rlmed.core.types import Completion, Example, Prompt, RolloutGroup, RolloutRequest, SamplingParams
from rlmed.data.loading import Dataset, EvalFile
from rlmed.data.prompts import PromptRenderer
from rlmed.evaluation.controls import Query, plan_line, queries_of
from rlmed.evaluation.faithfulness import measure_faithfulness, write_faithfulness
from rlmed.evaluation.preflight import went_on, why_cut
from rlmed.evaluation.records import EvalRow
from rlmed.evaluation.report_metrics import ReportMetric, report_metrics
from rlmed.evaluation.results import EvalSummary, FileSummary, write_evaluation
from rlmed.evaluation.summary import summarise
from rlmed.tasks.registry import task_of

log = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]
"""Called for each completion with its file's name, completions done, and their total."""

IN_FLIGHT = 128
"""Most prompts in the pool: bounds the memory of rendered pictures and keeps every engine busy."""
CUT = 0.5
"""Share of completions cut by length above which to warn."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a run's model; only the step is given per call.

    Example:
        >>> evaluator = Evaluator.of_run(
        ...     config.eval, folder, data, pool, renderer, stop=(), model="models/base"
        ... )  # doctest: +SKIP
        >>> evaluator.evaluate(step=300, controls=True).accuracies  # doctest: +SKIP
        {'test_mri': 0.81, 'test_ct': 0.74}
    """

    files: Sequence[EvalFile]
    """Files with distinct names, and distinct ids within a file."""
    pool: RolloutPool
    """Its current weights are evaluated."""
    renderer: PromptRenderer
    """The renderer used in training."""
    train_examples: Sequence[Example]
    """Rows to fit the image-free prior on; may be empty."""
    max_tokens: int
    """Longest completion."""
    stop: tuple[str, ...] = ()
    """Stop strings, as in training."""
    folder: Path
    """Folder of step folders; created if missing."""
    model: str
    """Name or folder of the model, for the record."""
    on_progress: OnProgress | None = None
    report_metrics: tuple[ReportMetric, ...] = ()
    """Further scores of written answers."""

    @classmethod
    def of_run(
        cls,
        settings: EvalConfig,
        run_folder: Path,
        data: Dataset,
        pool: RolloutPool,
        renderer: PromptRenderer,
        *,
        stop: tuple[str, ...],
        model: str,
        on_progress: OnProgress | None = None,
    ) -> Evaluator:
        """Build the evaluator from a run's settings and data."""
        files = data.eval_files(settings.limit)
        return cls(
            files=files,
            pool=pool,
            renderer=renderer,
            train_examples=data.train_examples,
            max_tokens=settings.max_tokens,
            stop=stop,
            folder=run_folder / "evaluations",
            model=model,
            on_progress=on_progress,
            report_metrics=report_metrics(settings.report_metrics, files),
        )

    def evaluate(self, step: int, *, controls: bool) -> EvalSummary:
        """Answer all questions greedily; write `folder/step-000123/`: `summary.json`, `rows.jsonl`.

        With controls `faithfulness.json`, too. An earlier evaluation of the same step is replaced
        once the new one is complete.

        Args:
            step: training step of the pool's weights.
            controls: also ask on grey pictures, on shuffled ones and with reordered options: four
                times the work; of questions about several pictures six times.

        Raises:
            ValueError: without files, or for an empty file, repeated names or ids, or a question
                that cannot be rendered.
            RuntimeError: if the pool is busy.
            RewardError: if the model of a report metric cannot be loaded.
        """
        _check(self.files)
        if self.pool.in_flight:
            raise RuntimeError(f"evaluation needs an idle pool, but {self.pool.in_flight} requests are in flight")
        for metric in self.report_metrics:
            metric.model.load()  # what fails does so before hours of answers
        start = time.perf_counter()
        queries = [query for file in self.files for query in queries_of(file, controls=controls)]
        if controls:
            log.info("%s", plan_line(queries))
        rows = self._answer(queries)
        by_file: Mapping[str, list[EvalRow]] = defaultdict(list)
        for row in rows:
            by_file[row.file].append(row)
        for metric in self.report_metrics:
            by_file = {name: metric.score(answers) for name, answers in by_file.items()}
        rows = [row for answers in by_file.values() for row in answers]
        summary = EvalSummary(
            model=self.model,
            step=step,
            seconds=time.perf_counter() - start,
            max_tokens=self.max_tokens,
            train_rows=len(self.train_examples),
            files=tuple(summarise(file, by_file[file.name], self.train_examples) for file in self.files),
        )
        write_faithfulness(write_evaluation(self.folder, summary, rows), measure_faithfulness(rows))
        for file in summary.files:
            _warn_of_cuts(file, by_file[file.name], self.max_tokens, self.renderer)
        return summary

    def count(self, *, controls: bool) -> int:
        """Return the number of answers of an evaluation."""
        return sum(1 for file in self.files for _ in queries_of(file, controls=controls))

    def _answer(self, queries: Sequence[Query]) -> list[EvalRow]:
        """Return the judged answers, in the order of the queries."""
        sampling = SamplingParams(temperature=0.0, max_tokens=self.max_tokens, stop=self.stop)
        requests = (
            RolloutRequest(index=index, prompt=query.render(self.renderer), group_size=1, sampling=sampling)
            for index, query in enumerate(queries)
        )
        rows: dict[int, EvalRow] = {}
        for done, group in enumerate(answer_all(requests, self.pool), 1):
            query = queries[group.request.index]
            rows[group.request.index] = _judge(query, group.prompt, group.completions[0], self.renderer)
            if self.on_progress is not None:
                self.on_progress(query.file, done, len(queries))
        assert len(rows) == len(queries), "the pool answered a request twice and another never"
        return [rows[index] for index in range(len(queries))]


def _check(files: Sequence[EvalFile]) -> None:
    if not files:
        raise ValueError("data.eval is empty: name at least one file to evaluate")
    names = [file.name for file in files]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"evaluation files must have distinct names, but {', '.join(repeated)} occurs twice: rename one"
        )
    for file in files:
        if not file.examples:
            raise ValueError(f"evaluation file {file.name} has no rows: check the file, or leave it out of data.eval")
        seen: set[str] = set()
        for example in file.examples:
            if example.id in seen:
                raise ValueError(
                    f"evaluation file {file.name}: id {example.id!r} occurs twice: ids must be unique, results are paired by id"
                )
            seen.add(example.id)


def answer_all(requests: Iterable[RolloutRequest], pool: RolloutPool) -> Iterator[RolloutGroup]:
    """Submit requests to an idle pool, a bounded number at a time; yield groups as they finish."""
    waiting = iter(requests)
    while True:
        for request in islice(waiting, IN_FLIGHT - pool.in_flight):
            pool.submit(request)
        if not pool.in_flight:
            return
        yield pool.collect()


def _judge(query: Query, prompt: Prompt, completion: Completion, renderer: PromptRenderer) -> EvalRow:
    """Return a completion as the task of its question judges it."""
    example = prompt.example
    task = task_of(example)
    judgement = task.judge(example, completion.text)
    # a chat template that opens the reasoning asks for it too
    reasoned = renderer.asks_for_reasoning(example) or opens_thinking(prompt.prefill)
    in_format = has_format if reasoned else has_answer_format
    return EvalRow(
        file=query.file,
        id=example.id,
        control=query.control,
        image=None if example.image is None else str(example.image),
        question_type=example.kind,
        question=example.question,
        options=example.options,
        answer=task.right_answer(example),
        completion=completion.text,
        predicted_letter=judgement.answer if example.is_choice else None,
        correct=judgement.correct,
        format=in_format(completion.text),
        tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        more_images=tuple(map(str, example.more_images)),
        task=example.task,
        truth=example.truth,
        predicted=judgement.answer,
        scores=judgement.scores,
    )


def _warn_of_cuts(file: FileSummary, rows: Sequence[EvalRow], max_tokens: int, renderer: PromptRenderer) -> None:
    if file.cut_by_length > CUT:
        share = float(np.mean([went_on(row.completion, row.finish_reason) for row in rows if row.control == "none"]))
        cause = why_cut(file.cut_by_length, share, f"eval.max_tokens={max_tokens}", renderer.end_tokens)
        log.warning("%s: %s", file.name, cause)
