"""Measure how far answers can be relied on, by asking again in other ways (docs/reliability.md).

It draws samples at temperature 1, greedy answers with reordered options, and the probabilities of
the option letters, after the evaluation's reasoning and without reasoning.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlmed.core.parsing import evaluated_letter
from rlmed.core.prefill import ANSWER
from rlmed.core.types import Example, Prompt, RolloutGroup, RolloutRequest, SamplingParams
from rlmed.data.options.order import keeps_order
from rlmed.data.sampler import shuffle_options
from rlmed.evaluation.option_likelihood import answer_opening, letter_probabilities
from rlmed.evaluation.records import EvalRow
from rlmed.evaluation.reliability.figures import (
    Argued,
    calibration,
    domains,
    order_sensitivity,
    reasoning_agreement,
    reliance,
    sampling,
)
from rlmed.evaluation.reliability.results import (
    FileReliability,
    OrderAnswer,
    QuestionAnswers,
    ReliabilitySummary,
    write_reliability,
)
from rlmed.evaluation.results import read_rows, step_folder
from rlmed.evaluation.run import Evaluator, OnProgress, answer_all
from rlmed.models.policy import Policy

ORDER_SEEDS = (1, 2, 3)
"""Seeds of the option orders to ask in addition to the file's."""

Key = tuple[str, str]
"""File and id of a question."""


@dataclass(frozen=True, slots=True)
class ReliabilitySettings:
    """How to ask the model.

    Example:
        ReliabilitySettings(samples=8, seed=0, token_budget=16384)
    """

    samples: int
    """Completions of each question at temperature 1."""
    seed: int
    """Seed of the samples; question i draws from seed + i."""
    token_budget: int
    """Most tokens in a packed row for scoring letters."""


def measure_reliability(
    evaluator: Evaluator,
    step: int,
    policy: Policy,
    settings: ReliabilitySettings,
    argued: Argued,
    on_progress: OnProgress | None = None,
) -> ReliabilitySummary:
    """Ask an evaluation's questions again; add `reliability.json` and `reliability_rows.jsonl`.

    Args:
        evaluator: it has evaluated `step`.
        step: step of that evaluation.
        policy: the weights of its pool, to score letters.
        settings: how to ask.
        argued: finds the option that a reasoning argues for.
        on_progress: called for each question with the part's name, the questions done and their
            total.
    """
    start = time.perf_counter()
    folder = step_folder(evaluator.folder, step)
    rows = read_rows(folder)
    answers = _Asker(evaluator, policy, settings, on_progress).ask(
        {(row.file, row.id): row for row in rows if row.control == "none"}
    )
    summary = ReliabilitySummary(
        model=evaluator.model,
        seconds=time.perf_counter() - start,
        files=tuple(
            _file_reliability(
                [row for row in rows if row.file == file.name],
                [answer for answer in answers if answer.file == file.name],
                argued,
            )
            for file in evaluator.files
        ),
        domains=domains(rows, answers, evaluator.train_examples),
    )
    write_reliability(folder, summary, answers)
    return summary


def _file_reliability(rows: Sequence[EvalRow], answers: Sequence[QuestionAnswers], argued: Argued) -> FileReliability:
    reasoned = [(answer.reasoned, answer.answer) for answer in answers if answer.reasoned is not None]
    direct = calibration([answer.direct for answer in answers], [answer.answer for answer in answers])
    assert direct is not None
    turned = [answer for answer in answers if len(answer.orders) > 1]
    return FileReliability(
        name=answers[0].file,
        rows=len(answers),
        reasoned=calibration([probabilities for probabilities, _ in reasoned], [letter for _, letter in reasoned]),
        direct=direct,
        sampling=sampling(answers),
        order=order_sensitivity(turned) if turned else None,
        kept_order=len(answers) - len(turned),
        reliance=reliance(rows),
        agreement=reasoning_agreement(rows, argued),
    )


@dataclass(frozen=True)
class _Asker:
    """Ask the same questions in several ways."""

    evaluator: Evaluator
    policy: Policy
    settings: ReliabilitySettings
    on_progress: OnProgress | None

    @functools.cached_property
    def questions(self) -> dict[Key, Example]:
        """All questions, in the order of the data."""
        return {(file.name, example.id): example for file in self.evaluator.files for example in file.examples}

    def ask(self, rows: Mapping[Key, EvalRow]) -> list[QuestionAnswers]:
        """Return all answers to each question; its greedy answer is its row."""
        samples = self._samples()
        orders = [self._order(seed) for seed in ORDER_SEEDS]
        openings = {
            key: opening for key, row in rows.items() if (opening := answer_opening(row.completion)) is not None
        }
        reasoned = self._probabilities("letters after reasoning", openings)
        direct = self._probabilities("letters without reasoning", dict.fromkeys(self.questions, ANSWER))
        return [
            QuestionAnswers(
                file=key[0],
                id=example.id,
                modality=example.modality,
                answer=example.letter,
                reasoned=reasoned.get(key),
                direct=direct[key],
                samples=samples[key],
                orders=(
                    OrderAnswer(example.options, example.letter, rows[key].predicted_letter),
                    *(order[key] for order in orders if key in order),
                ),
            )
            for key, example in self.questions.items()
        ]

    def _samples(self) -> dict[Key, tuple[str | None, ...]]:
        settings, drawn = self.settings, self._sampling(temperature=1.0)
        requests = (
            RolloutRequest(i, prompt, settings.samples, dataclasses.replace(drawn, seed=settings.seed + i))
            for i, prompt in enumerate(self._prompts(self.questions.values()))
        )
        groups = self._groups("samples", requests, list(self.questions))
        return {
            key: tuple(evaluated_letter(entry.text) for entry in group.completions) for key, group in groups.items()
        }

    def _order(self, seed: int) -> dict[Key, OrderAnswer]:
        """Return greedy answers in another option order, for questions that can be reordered."""
        greedy = self._sampling(temperature=0.0)
        plain = {key: example for key, example in self.questions.items() if not keeps_order(example.options)}
        shuffled = (shuffle_options(example, seed) for example in plain.values())
        requests = (RolloutRequest(i, prompt, 1, greedy) for i, prompt in enumerate(self._prompts(shuffled)))
        groups = self._groups(f"option order {seed}", requests, list(plain))
        return {
            key: OrderAnswer(
                group.prompt.example.options,
                group.prompt.example.letter,
                evaluated_letter(group.completions[0].text),
            )
            for key, group in groups.items()
        }

    def _sampling(self, temperature: float) -> SamplingParams:
        return SamplingParams(temperature=temperature, max_tokens=self.evaluator.max_tokens, stop=self.evaluator.stop)

    def _prompts(self, examples: Iterable[Example]) -> Iterator[Prompt]:
        return (self.evaluator.renderer.render(example) for example in examples)

    def _groups(self, part: str, requests: Iterator[RolloutRequest], keys: Sequence[Key]) -> dict[Key, RolloutGroup]:
        """Return the finished groups, without pictures, by question."""
        found: dict[Key, RolloutGroup] = {}
        for group in answer_all(requests, self.evaluator.pool):
            bare = dataclasses.replace(group.request, prompt=dataclasses.replace(group.prompt, image_inputs={}))
            found[keys[group.request.index]] = dataclasses.replace(group, request=bare)
            self._tell(part, len(found), len(keys))
        return found

    def _probabilities(self, part: str, openings: Mapping[Key, str]) -> dict[Key, tuple[float, ...]]:
        cases = ((self.evaluator.renderer.render(self.questions[key]), text) for key, text in openings.items())
        scored = letter_probabilities(
            cases, policy=self.policy, renderer=self.evaluator.renderer, token_budget=self.settings.token_budget
        )
        found: dict[Key, tuple[float, ...]] = {}
        for key, probabilities in zip(openings, scored, strict=True):
            found[key] = tuple(probabilities.tolist())
            self._tell(part, len(found), len(openings))
        return found

    def _tell(self, part: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(part, done, total)
