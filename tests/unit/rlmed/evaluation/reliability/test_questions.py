"""The figures of a reliability report on answers worked by hand; their files."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from rlmed.core.calibration import pass_at_k
from rlmed.core.statistics import mcnemar
from rlmed.core.types import Example
from rlmed.data.loading import EvalFile
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.evaluation.records import EvalRow
from rlmed.evaluation.reliability.figures import (
    calibration,
    domains,
    order_sensitivity,
    reasoning_agreement,
    reliance,
    sampling,
)
from rlmed.evaluation.reliability.questions import ReliabilitySettings, _Asker, _file_reliability
from rlmed.evaluation.reliability.results import (
    FileReliability,
    OrderAnswer,
    QuestionAnswers,
    ReliabilitySummary,
    write_reliability,
)
from rlmed.evaluation.reliability.table import reliability_table
from rlmed.evaluation.run import Evaluator
from rlmed.report.reliability import show_reliability
from tests.unit.rlmed.evaluation.test_run import ScriptedPool, make_rows

TEXTS = ("head", "knee", "chest")


def answer(number, *, right="A", samples=("A", "B"), orders=None, modality="CT", **changes):
    plain = OrderAnswer(TEXTS, right, right)
    values = {"reasoned": (0.6, 0.3, 0.1), "direct": (0.2, 0.5, 0.3)} | changes
    return QuestionAnswers(
        "f", str(number), modality, right, samples=samples, orders=orders or (plain, plain), **values
    )


def row(number, right, control="none", question_type="anatomy", completion="", predicted_letter="A"):
    return EvalRow(
        "f",
        str(number),
        control,
        None,
        question_type,
        "?",
        TEXTS,
        "A",
        completion,
        predicted_letter,
        right,
        True,
        3,
        "stop",
    )


def test_calibration_is_that_of_the_likeliest_option():
    found = calibration([(0.8, 0.2), (0.3, 0.7), (0.6, 0.4), (0.9, 0.1)], ["A", "B", "B", "A"])
    assert (found.accuracy.correct, found.accuracy.rows) == (3, 4)
    assert found.confidence.value == pytest.approx((0.8 + 0.7 + 0.6 + 0.9) / 4)
    # each question has a bin of its own
    assert found.error.value == pytest.approx((0.2 + 0.3 + 0.6 + 0.1) / 4)
    assert found.brier.value == pytest.approx(2 * (0.2**2 + 0.3**2 + 0.6**2 + 0.1**2) / 4)
    assert [(entry.count, entry.correct) for entry in found.bins] == [(1, 0), (1, 1), (1, 1), (1, 1)]
    assert calibration([], []) is None


def test_samples_give_passes_at_powers_of_two_and_a_vote():
    answers = [
        answer(0, samples=("A", "A", "B", "B", None, "A")),
        answer(1, samples=("B", "A", "A", "B", None, None)),  # a draw: the one that came first
        answer(2, samples=("Z", "Z", "Z", "A", None, None)),  # Z is no option's letter
        answer(3, samples=(None,) * 6),
    ]
    found = sampling(answers)
    assert [entry.k for entry in found.passes] == [1, 2, 4, 6]
    for entry in found.passes:
        assert entry.share.value == pytest.approx(np.mean([pass_at_k(6, right, entry.k) for right in (3, 2, 1, 0)]))
    assert (found.vote.correct, found.vote.rows, found.samples) == (2, 4, 6)


def test_an_answer_stays_when_its_text_does_and_its_letter_follows():
    turned = ("knee", "chest", "head")
    answers = [
        # head both times
        answer(0, orders=(OrderAnswer(TEXTS, "A", "A"), OrderAnswer(turned, "C", "C"))),
        # letter A both times
        answer(1, orders=(OrderAnswer(TEXTS, "A", "A"), OrderAnswer(turned, "C", "A"))),
        # knee both times, wrong
        answer(2, orders=(OrderAnswer(TEXTS, "A", "B"), OrderAnswer(turned, "C", "A"))),
        # no option at all
        answer(3, orders=(OrderAnswer(TEXTS, "A", None), OrderAnswer(turned, "C", "J"))),
    ]
    found = order_sensitivity(answers)
    assert (found.stays.correct, found.stays.rows) == (2, 4)
    assert [one.correct for one in found.orders] == [2, 1]
    assert [(one.letter, one.chosen.value, one.correct) for one in found.letters] == [
        ("A", 4 / 8, 4 / 8),
        ("B", 1 / 8, 0),
        ("C", 1 / 8, 4 / 8),
    ]
    assert [one.accuracy and one.accuracy.value for one in found.letters] == [2 / 4, None, 1 / 4]


def test_a_letter_counts_only_among_questions_that_have_it():
    pair = answer(0, direct=(0.5, 0.5), orders=(OrderAnswer(("head", "knee"), "A", "A"),))
    triple = answer(1, orders=(OrderAnswer(TEXTS, "C", "C"),))
    shares = {one.letter: one.chosen for one in order_sensitivity([pair, triple]).letters}
    assert (shares["A"].value, shares["A"].rows) == (0.5, 2)
    assert (shares["C"].value, shares["C"].rows) == (1.0, 1)


def test_questions_whose_options_refer_to_others_are_asked_in_their_order_alone(tmp_path):
    turned = (OrderAnswer(TEXTS, "A", "A"), OrderAnswer(("knee", "chest", "head"), "C", "A"))
    kept = (OrderAnswer(TEXTS, "A", "A"),)
    rows = [row(i, True) for i in range(3)]
    mixed = _file_reliability(
        rows, [answer(0, orders=turned), answer(1, orders=kept), answer(2, orders=turned)], argue_nothing
    )
    assert mixed.order is not None
    assert (mixed.order.stays.correct, mixed.order.stays.rows, mixed.kept_order, mixed.rows) == (0, 2, 1, 3)
    fixed = dataclasses.replace(
        _file_reliability(rows, [answer(i, orders=kept) for i in range(3)], argue_nothing), name="g"
    )
    assert (fixed.order, fixed.kept_order) == (None, 3)
    summary = ReliabilitySummary("tiny", 1.5, (fixed, mixed), ())
    write_reliability(tmp_path, summary, ())
    assert ReliabilitySummary.read(tmp_path) == summary
    shown = show_reliability(summary)
    assert shown["orders"] == 2
    assert [plot.title for plot in shown["plots"] if "letters" in plot.title] == ["f: letters over 2 option orders"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(reliability_table(summary))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["same", "option", "in", "all", "orders", "–", "0.0", "(0–66)"] in lines
    assert ["rows", "that", "keep", "their", "order", "3", "1"] in lines


def test_only_questions_that_have_another_order_are_asked_in_it(tmp_path, tiny_folder):
    renderer = PromptRenderer(*load_processor(tiny_folder("qwen2_vl")), max_prompt_tokens=512)
    asked = make_rows(tmp_path, "mri", 4)
    asked[2] = dataclasses.replace(asked[2], options=("head", "chest", "abdomen", "all of the above"))
    pool = ScriptedPool(renderer, lambda *_: "<think>x</think><answer>A</answer>")
    evaluator = Evaluator(
        files=[EvalFile("mri", tuple(asked))], pool=pool, renderer=renderer, train_examples=(), max_tokens=8, folder=tmp_path,
        model="tiny",
    )  # fmt: skip
    asker = _Asker(evaluator, None, ReliabilitySettings(samples=1, seed=0, token_budget=64), None)
    orders = asker._order(1)
    assert sorted(orders) == [("mri", "0"), ("mri", "1"), ("mri", "3")]
    for (_, name), order in orders.items():
        own = asked[int(name)]
        assert sorted(order.options) == sorted(own.options)
        assert order.options["ABCD".index(order.answer)] == own.options[own.answer]
    assert sorted(asker._samples()) == [("mri", str(n)) for n in range(4)]


def argue_nothing(reasoning, options):
    return None


def test_reliance_pairs_questions_by_type_and_leaves_out_those_without_a_control():
    rows = [row(i, i < 6, question_type="anatomy" if i < 5 else "modality") for i in range(8)]
    rows += [row(i, i in (0, 7), "blank", "anatomy" if i < 5 else "modality") for i in range(8)]
    rows += [row(i, False, "shuffled") for i in (0, 1)]
    whole, anatomy, modality = reliance(rows)
    assert [(one.question_type, one.real.correct, one.real.rows) for one in (whole, anatomy, modality)] == [
        ("", 6, 8),
        ("anatomy", 5, 5),
        ("modality", 1, 3),
    ]
    assert (whole.blank.control.correct, whole.blank.difference.value) == (2, 0.5)
    real, blank = np.arange(8) < 6, np.isin(np.arange(8), (0, 7))
    assert whole.blank.p_value == mcnemar(blank, real).p_value
    assert whole.blank.difference.low < 0.5 < whole.blank.difference.high
    assert (anatomy.shuffled.difference.value, anatomy.shuffled.control.rows) == (1.0, 2)
    assert modality.shuffled is None


def test_domains_part_by_the_modalities_of_the_training_rows():
    answers = [answer(i, modality=("MRI", "MRI", "CT", "")[i]) for i in range(4)]
    rows = [row(i, i != 1) for i in range(4)] + [row(2, False, "blank")]
    train = [Example("t", None, "?", TEXTS, 0, modality="MRI"), Example("u", None, "?", TEXTS, 0)]
    inside, outside = domains(rows, answers, train)
    assert (inside.trained, inside.modalities, inside.real.correct, inside.real.rows) == (True, ("MRI",), 1, 2)
    assert (outside.trained, outside.modalities, outside.real.correct, outside.real.rows) == (False, ("CT",), 1, 1)
    assert inside.blank is None
    assert outside.blank.rows == 1
    assert domains(rows, answers, ()) == ()


def test_agreement_asks_for_what_the_reasoning_alone_argues():
    seen = []

    def argued(reasoning, options):
        seen.append((reasoning, options))
        return options.index(reasoning) if reasoning in options else None

    def written(text, letter):
        return f"<think>{text}</think><answer>{letter}</answer>"

    rows = [
        row(0, True, completion=written("head", "A")),
        row(1, False, completion=written("knee", "B"), predicted_letter="B"),
        row(2, True, completion=written("knee", "A")),
        row(3, True, completion=written("who knows", "A")),
        row(4, True, "blank", completion=written("head", "A")),
    ]
    found = reasoning_agreement(rows, argued)
    assert [text for text, _ in seen] == ["head", "knee", "knee", "who knows"]
    assert {options for _, options in seen} == {TEXTS}
    assert (found.argued.correct, found.argued.rows) == (3, 4)
    assert (found.agrees.correct, found.agrees.rows) == (2, 3)
    assert (found.correct_if_agreeing.correct, found.correct_if_agreeing.rows) == (1, 2)
    assert (found.correct_if_differing.correct, found.correct_if_differing.rows) == (1, 1)
    unclear = reasoning_agreement(rows, lambda reasoning, options: None)
    assert (unclear.argued.correct, unclear.agrees, unclear.correct_if_differing) == (0, None, None)


def test_a_report_is_read_back_as_it_was_written_and_drawn(tmp_path):
    answers = [answer(i) for i in range(4)]
    rows = [row(i, i < 3) for i in range(4)] + [row(i, i < 1, "blank") for i in range(4)]
    likely = calibration([entry.direct for entry in answers], ["A"] * 4)
    file = FileReliability(
        name="f",
        rows=4,
        reasoned=None,
        direct=likely,
        sampling=sampling(answers),
        order=order_sensitivity(answers),
        reliance=reliance(rows),
        agreement=reasoning_agreement(rows, lambda reasoning, options: 0),
    )
    train = [Example("t", None, "?", TEXTS, 0, modality="CT")]
    summary = ReliabilitySummary("tiny", 1.5, (file,), domains(rows, answers, train))
    write_reliability(tmp_path, summary, answers)
    assert ReliabilitySummary.read(tmp_path) == summary
    lines = [json.loads(line) for line in (tmp_path / "reliability_rows.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps([dataclasses.asdict(entry) for entry in answers]))
    plots = show_reliability(summary)["plots"]
    assert [plot.title for plot in plots] == [
        "f: reliability without reasoning",
        "f: pass@k",
        "f: letters over 2 option orders",
    ]
    # colours are variables of the page, so that they follow light and dark
    assert not any("#0102" in plot.svg or "#0103" in plot.svg for plot in plots)
    assert all("var(--series-" in plot.svg for plot in plots)
