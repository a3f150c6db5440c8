"""The bookkeeping of an evaluation: controls, figures, files on disk, comparison.

A scripted pool answers by the picture.
"""

import copy
import dataclasses
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from rlmed.core.files.atomic import RecordError
from rlmed.core.prefill import joined
from rlmed.core.types import LETTERS, Completion, Example, RolloutGroup, RolloutRequest
from rlmed.data.loading import EvalFile
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.data.templates import Templates
from rlmed.evaluation import run as evaluation
from rlmed.evaluation.results import EvalSummary, compare, read_rows
from rlmed.evaluation.run import Evaluator
from rlmed.evaluation.table import summary_table
from rlmed.models.tiny.build import build_tiny_vl

BODY_PARTS = ("head", "chest", "abdomen", "knee")
LEVELS = (20, 60, 180, 240)
"""Grey level of the picture that shows each body part; the blank picture's is none of them."""


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> PromptRenderer:
    folder = tmp_path_factory.mktemp("tiny-vl")
    build_tiny_vl(folder)
    return PromptRenderer(*load_processor(folder), max_prompt_tokens=512)


@pytest.fixture
def files(tmp_path: Path) -> list[EvalFile]:
    """Two files of 8 and 6 rows; only the picture gives the answer; option order turns by row."""
    return [EvalFile(name, tuple(make_rows(tmp_path, name, count))) for name, count in (("mri", 8), ("ct", 6))]


def make_rows(folder: Path, name: str, count: int) -> list[Example]:
    rows = []
    for i in range(count):
        path = folder / f"{name}-{i}.png"
        Image.new("RGB", (56, 84), (LEVELS[i % 4],) * 3).save(path)
        options = BODY_PARTS[i // 4 :] + BODY_PARTS[: i // 4]
        kind = "anatomy" if i % 2 else "modality"
        answer = options.index(BODY_PARTS[i % 4])
        rows.append(Example(id=str(i), image=path, question="Which?", options=options, answer=answer, kind=kind))
    return rows


def grey_level(request: RolloutRequest, renderer: PromptRenderer) -> int:
    """Grey level of the picture in the prompt, from its normalised pixels."""
    processor = renderer.pictures.image_processor
    value = float(request.prompt.image_inputs["pixel_values"][0, 0])
    return round(255 * (value * processor.image_std[0] + processor.image_mean[0]))


def looks(request: RolloutRequest, renderer: PromptRenderer) -> str:
    """What a model that reads pictures well would say; over an unreadable picture, always A."""
    level = grey_level(request, renderer)
    options = request.prompt.example.options
    letter = LETTERS[options.index(BODY_PARTS[LEVELS.index(level)])] if level in LEVELS else "A"
    return f"<think>level {level}</think><answer>{letter}</answer>"


class ScriptedPool:
    """Answers each request by `answer`, the newest first, and remembers what it was asked."""

    def __init__(self, renderer, answer=looks, finish_reason="stop"):
        self.renderer, self.answer, self.finish_reason = renderer, answer, finish_reason
        self.waiting, self.requests, self.most_in_flight = [], [], 0

    @property
    def in_flight(self):
        return len(self.waiting)

    def submit(self, request):
        self.requests.append(request)
        self.waiting.append(request)
        self.most_in_flight = max(self.most_in_flight, len(self.waiting))

    def collect(self):
        request = self.waiting.pop()
        text = self.answer(request, self.renderer)
        tokens = np.arange(len(text.split()), dtype=np.int64)
        completion = Completion(tokens, tokens.astype(np.float32), text, self.finish_reason)
        return RolloutGroup(request, (completion,))


def run(files, renderer, folder, pool=None, *, step=3, controls=True, **settings):
    pool = pool or ScriptedPool(renderer)
    bound = {"train_examples": (), "max_tokens": 32, "model": "tiny", **settings}
    evaluator = Evaluator(files=files, pool=pool, renderer=renderer, folder=folder, **bound)
    return evaluator.evaluate(step, controls=controls)


def test_requests_are_single_and_greedy_and_each_is_made_once(files, renderer, tmp_path):
    pool = ScriptedPool(renderer)
    run(files, renderer, tmp_path / "eval", pool)
    assert {request.group_size for request in pool.requests} == {1}
    assert {(request.sampling.temperature, request.sampling.max_tokens) for request in pool.requests} == {(0.0, 32)}
    assert sorted(request.index for request in pool.requests) == list(range(4 * 14))
    assert pool.in_flight == 0


def test_controls_change_the_picture_and_nothing_else(files, renderer, tmp_path):
    pool = ScriptedPool(renderer)
    run(files, renderer, tmp_path / "eval", pool)
    plain, blank, shuffled = (pool.requests[start : start + 8] for start in (0, 8, 16))
    levels = [[grey_level(request, renderer) for request in requests] for requests in (plain, blank, shuffled)]
    assert levels[0] == [*LEVELS, *LEVELS]
    assert levels[1] == [128] * 8
    assert sorted(levels[2]) == sorted(levels[0])
    assert levels[2] != levels[0]
    for requests in (blank, shuffled):
        assert [request.prompt.text for request in requests] == [request.prompt.text for request in plain]
        assert [request.prompt.token_ids.tolist() for request in requests] == [
            request.prompt.token_ids.tolist() for request in plain
        ]
    assert np.ptp(blank[0].prompt.image_inputs["pixel_values"].reshape(-1, 3, 392), axis=(0, 2)).max() == 0


def test_another_order_of_the_options_and_nothing_else(files, renderer, tmp_path):
    """Each row has another order, which letter and reading model follow; the same next time."""
    written = dataclasses.replace(files[0].examples[0], completion="<think>head</think><answer>A</answer>")
    rows = (written, *files[0].examples[1:])
    pools = [ScriptedPool(renderer), ScriptedPool(renderer, lambda *_: "<think>x</think><answer>A</answer>")]
    by_eye, by_letter = (run([EvalFile("mri", rows)], renderer, tmp_path, pool).files[0] for pool in pools)
    asked = [[request.prompt.example for request in pool.requests[24:32]] for pool in pools]
    assert asked[0] == asked[1]
    for example, own in zip(asked[0], rows, strict=True):
        assert example.options != own.options
        assert sorted(example.options) == sorted(own.options)
        assert example.options[example.answer] == own.options[own.answer]
        assert (example.id, example.image, example.question) == (own.id, own.image, own.question)
    assert (by_eye.reordered.correct, by_eye.reordered.rows) == (8, 8)
    # A is right in rows 0 and 5, and wherever the other order has put the right option first
    assert by_letter.accuracy.correct == 2
    assert by_letter.reordered.correct == sum(example.answer == 0 for example in asked[0])


def test_rows_whose_options_refer_to_others_have_no_other_order_and_it_is_said(files, renderer, tmp_path):
    rows = list(files[0].examples)
    for place, last in ((1, "all of the above"), (4, "B and C")):
        rows[place] = dataclasses.replace(rows[place], options=(*BODY_PARTS, last), answer=place % 4)
    fixed = tuple(dataclasses.replace(row, options=(*BODY_PARTS, "both"), answer=0) for row in rows)
    summary = run([EvalFile("mri", tuple(rows)), EvalFile("fixed", fixed), files[1]], renderer, tmp_path)
    mri, none, ct = summary.files
    assert (mri.rows, mri.reordered.rows, mri.kept_order) == (8, 6, 2)
    assert (none.reordered, none.kept_order) == (None, 8)
    assert (ct.reordered.rows, ct.kept_order) == (6, 0)
    asked = [row for row in read_rows(tmp_path / "step-000003") if row.control == "reordered" and row.file == "mri"]
    assert [row.id for row in asked] == ["0", "2", "3", "5", "6", "7"]
    assert EvalSummary.read(tmp_path / "step-000003") == summary
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(None, summary, None))
    shown = " ".join(console.export_text().split())
    said = r"mri: 2 of 8 rows .* order .*'all of the above'"
    assert re.search(said, shown)
    assert re.search(r"fixed: 8 of 8 rows .* order .*'both'", shown)
    assert "ct: " not in shown


def test_a_model_that_looks_is_right_only_over_its_own_picture(files, renderer, tmp_path):
    summary = run(files, renderer, tmp_path / "eval")
    mri, ct = summary.files
    assert (mri.accuracy.correct, mri.accuracy.rows, mri.rows) == (8, 8, 8)
    assert (ct.accuracy.correct, ct.accuracy.rows) == (6, 6)
    # the answer to a grey picture is A: right in row 0 and in row 5, where "chest" comes first
    assert (mri.blank.correct, mri.blank.rows) == (2, 8)
    rows = [row for row in read_rows(tmp_path / "eval/step-000003") if row.control == "shuffled" and row.file == "mri"]
    level_of = {str(example.image): LEVELS[int(example.id) % 4] for example in files[0].examples}
    expected = [LEVELS[int(row.id) % 4] == level_of[row.image] for row in rows]
    assert [row.correct for row in rows] == expected
    assert (mri.shuffled.correct, mri.shuffled.rows) == (sum(expected), 8)


def test_rows_are_complete_and_in_the_order_of_the_data(files, renderer, tmp_path):
    run(files, renderer, tmp_path / "eval")
    lines = (tmp_path / "eval/step-000003/rows.jsonl").read_text().splitlines()
    keys = [(row["file"], row["control"], row["id"]) for row in map(json.loads, lines)]
    assert keys == [
        (file.name, control, example.id)
        for file in files
        for control in ("none", "blank", "shuffled", "reordered")
        for example in file.examples
    ]
    example = files[0].examples[5]
    assert json.loads(lines[5]) == {
        "file": "mri",
        "id": "5",
        "control": "none",
        "image": str(example.image),
        "question_type": "anatomy",
        "question": "Which?",
        "options": ["chest", "abdomen", "knee", "head"],
        "answer": "A",
        "completion": "<think>level 60</think><answer>A</answer>",
        "predicted_letter": "A",
        "correct": True,
        "format": True,
        "tokens": 2,
        "finish_reason": "stop",
    }


def test_the_figures_of_a_file(files, renderer, tmp_path):
    def answer(request, renderer):
        # odd rows without an answer, row 2 wrong, all cut
        if int(request.prompt.example.id) % 2:
            return "<think> one two three"
        return f"<think>x</think><answer>{'D' if request.prompt.example.id == '2' else 'A'}</answer>"

    train = [Example(id="t", image=None, question="?", options=BODY_PARTS, answer=2)]
    summary = run(
        files[:1], renderer, tmp_path, ScriptedPool(renderer, answer, "length"), train_examples=train, controls=False
    )
    (mri,) = summary.files
    # letters of rows 0 to 7: A B C D D A B C; even rows answer A, D, A, A
    assert mri.accuracy.correct == 1
    assert mri.by_question_type == {"anatomy": (0, 4), "modality": (1, 4)}
    assert mri.format_rate == 0.5
    assert mri.mean_tokens == 2.5
    assert mri.cut_by_length == 1.0
    assert mri.chance == 0.25
    # C is right in the training row, and in rows 2 and 7; "abdomen" is right in rows 2 and 6
    assert mri.majority_letter == 0.25
    assert mri.image_free_prior == 0.25
    assert mri.leave_one_out_prior == 0.0
    assert (mri.blank, mri.shuffled) == (None, None)
    assert (summary.train_rows, summary.mean_accuracy) == (1, 0.125)
    unanswered = [row for row in read_rows(tmp_path / "step-000003") if row.predicted_letter is None]
    assert [row.id for row in unanswered] == ["1", "3", "5", "7"]


def test_the_format_is_the_one_that_the_prompt_asks_for(files, renderer, tmp_path):
    brief = PromptRenderer(
        renderer.tokenizer, renderer.pictures, max_prompt_tokens=512, template="{question} <answer>...</answer>"
    )

    def answer(request, _):
        reasoned = int(request.prompt.example.id) < 3
        return f"{'<think>x</think>' if reasoned else ''}<answer>A</answer>"

    rates = []
    for one in (renderer, brief):
        summary = run(files[:1], one, tmp_path, ScriptedPool(one, answer), controls=False)
        rates.append(summary.files[0].format_rate)
    assert rates == [3 / 8, 5 / 8]


def test_what_the_template_has_written_belongs_to_the_completion(files, renderer, tmp_path):
    renderer = copy.copy(renderer)
    renderer.tokenizer = copy.deepcopy(renderer.tokenizer)
    renderer.tokenizer.chat_template = renderer.tokenizer.chat_template.replace(
        "assistant\\n", "assistant\\n<think>\\n"
    )

    def answer(request, _):
        return joined(request.prompt.prefill, "level 60</think><answer>A</answer>")

    pool = ScriptedPool(renderer, answer)
    summary = run(files[:1], renderer, tmp_path, pool, controls=False)
    assert pool.requests[0].prompt.text.endswith("assistant\n<think>\n")
    assert summary.files[0].format_rate == 1
    assert {row.completion for row in read_rows(tmp_path / "step-000003")} == {
        "<think>\nlevel 60</think><answer>A</answer>"
    }
    # a prompt that asks for an answer alone, and a template that opens a reasoning all the same
    renderer.templates = Templates("{question} <answer>...</answer>")
    assert run(files[:1], renderer, tmp_path, pool, controls=False).files[0].format_rate == 1


@pytest.mark.parametrize(
    ("text", "finish_reason", "said"),
    [
        (
            "<think>x</think><answer>A</answer> and",
            "length",
            r"continued after their answer until eval\.max_tokens=32.*<\|im_end\|>",
        ),
        ("<think>x", "length", r"were cut at eval\.max_tokens=32 before their answer: raise eval\.max_tokens"),
        ("<think>x</think><answer>A</answer>", "stop", None),
    ],
)
def test_completions_that_never_end_are_warned_of(files, renderer, tmp_path, caplog, text, finish_reason, said):
    run(files[:1], renderer, tmp_path, ScriptedPool(renderer, lambda *_: text, finish_reason), controls=False)
    assert len(caplog.records) == (said is not None)
    assert re.search(said or "", caplog.text)


def test_without_training_rows_there_is_no_fitted_prior(files, renderer, tmp_path):
    summary = run(files, renderer, tmp_path, controls=False)
    assert summary.files[0].image_free_prior is None
    assert summary.files[0].image_free_prior_by_rate is None


def test_the_summary_is_read_back_as_it_was(files, renderer, tmp_path):
    summary = run(files, renderer, tmp_path)
    assert EvalSummary.read(tmp_path / "step-000003") == summary
    plain = run(files, renderer, tmp_path, controls=False, step=1_000_000)
    assert EvalSummary.read(tmp_path / "step-1000000") == plain


def test_rows_without_a_picture_have_no_controls_of_pictures(files, renderer, tmp_path):
    text_only = tuple(dataclasses.replace(example, image=None) for example in files[0].examples)
    mixed = (*text_only[:2], *files[0].examples[2:])
    pool = ScriptedPool(renderer, lambda *_: "")
    summary = run([EvalFile("text", text_only), EvalFile("mixed", mixed)], renderer, tmp_path, pool)
    assert (summary.files[0].blank, summary.files[0].shuffled) == (None, None)
    assert (summary.files[1].blank.rows, summary.files[1].shuffled.rows) == (6, 6)
    assert [file.reordered.rows for file in summary.files] == [8, 8]
    assert len(pool.requests) == 8 + 8 + 6 + 6 + 8 + 8


def test_a_bounded_number_of_prompts_is_rendered_ahead(files, renderer, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "IN_FLIGHT", 5)
    pool = ScriptedPool(renderer)
    rendered_ahead = []

    def watch(name, done, total):
        rendered_ahead.append(len(pool.requests) - done)

    run(files, renderer, tmp_path, pool, on_progress=watch)
    assert pool.most_in_flight == 5
    assert max(rendered_ahead) == 4


def test_progress_counts_every_completion(files, renderer, tmp_path):
    calls = []
    run(files, renderer, tmp_path, on_progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == list(range(1, 57))
    assert {total for _, _, total in calls} == {56}
    assert Counter(name for name, _, _ in calls) == {"mri": 32, "ct": 24}


def test_an_evaluation_is_replaced_as_a_whole(files, renderer, tmp_path):
    first = run(files, renderer, tmp_path, ScriptedPool(renderer, lambda *_: ""))
    assert first.files[0].accuracy.correct == 0
    (tmp_path / "step-000003/comparison.json").write_text("{}")
    for leftover in ("partial", "replaced"):  # of a run that was killed while writing
        (tmp_path / f".step-000003.{leftover}").mkdir()
        (tmp_path / f".step-000003.{leftover}/junk").write_text("junk")
    second = run(files, renderer, tmp_path)
    assert EvalSummary.read(tmp_path / "step-000003") == second
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-000003"]
    assert sorted(path.name for path in (tmp_path / "step-000003").iterdir()) == [
        "faithfulness.json",
        "rows.jsonl",
        "summary.json",
    ]


def test_a_half_removed_evaluation_never_stands_under_its_name(files, renderer, tmp_path, monkeypatch):
    run(files, renderer, tmp_path)
    removed = []
    monkeypatch.setattr("rlmed.core.files.ownership.shutil.rmtree", lambda path, **_: removed.append(path.name))
    run(files, renderer, tmp_path, controls=False)
    (name,) = removed
    assert name.startswith(".step-000003.replaced-")
    assert len(read_rows(tmp_path / "step-000003")) == 14


def test_an_evaluation_that_fails_leaves_the_earlier_one(files, renderer, tmp_path, monkeypatch):
    first = run(files, renderer, tmp_path)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rlmed.evaluation.results.json.dumps", full_disk)
        with pytest.raises(RecordError, match=r"rows\.jsonl cannot be written: the disk is full"):
            run(files, renderer, tmp_path, controls=False)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-000003"]
    assert EvalSummary.read(tmp_path / "step-000003") == first
    assert len(read_rows(tmp_path / "step-000003")) == 56
    broken = dataclasses.replace(files[0].examples[0], id="broken", image=tmp_path / "missing.png")
    with pytest.raises((ValueError, OSError), match=r"missing\.png"):
        run([EvalFile("mri", (*files[0].examples, broken))], renderer, tmp_path)
    assert EvalSummary.read(tmp_path / "step-000003") == first


def test_impossible_input_is_an_error_that_names_it(files, renderer, tmp_path):
    busy = ScriptedPool(renderer)
    busy.waiting.append("a training request")
    with pytest.raises(RuntimeError, match="1 requests are in flight"):
        run(files, renderer, tmp_path, busy)
    for wrong, message in (
        ([], r"data\.eval"),
        ([EvalFile("empty", ())], "empty has no rows"),
        ([files[0], files[0]], "mri occurs twice"),
        ([EvalFile("mri", files[0].examples[:1] * 2)], "mri: id '0' occurs twice"),
    ):
        with pytest.raises(ValueError, match=message):
            run(wrong, renderer, tmp_path)


def answering(letter_of: dict[str, str]):
    """A model that answers by the row's id."""
    return lambda request, _: f"<think>x</think><answer>{letter_of[request.prompt.example.id]}</answer>"


def two_evaluations(files, renderer, tmp_path) -> tuple[EvalSummary, EvalSummary]:
    # right letters of rows 0 to 7: A B C D D A B C
    before = answering(dict(zip("01234567", "ABDDAAAA", strict=True)))
    after = answering(dict(zip("01234567", "ABCCDABC", strict=True)))
    return (
        run(files, renderer, tmp_path, ScriptedPool(renderer, before), step=0),
        run(files[::-1], renderer, tmp_path, ScriptedPool(renderer, after), step=300),
    )


def test_comparison_pairs_by_file_and_id(files, renderer, tmp_path):
    two_evaluations(files, renderer, tmp_path)
    comparison = compare(tmp_path / "step-000000", tmp_path / "step-000300")
    # right before: 0 1 3 5; after: all but 3
    assert comparison["files"]["mri"] == {
        "rows": 8,
        "correct_before": 4,
        "correct_after": 7,
        "gained": 4,
        "lost": 1,
        "p_value": 0.375,
    }
    assert comparison["files"]["ct"] == {
        "rows": 6,
        "correct_before": 4,
        "correct_after": 5,
        "gained": 2,
        "lost": 1,
        "p_value": 1.0,
    }
    assert comparison["before"] == {"model": "tiny", "step": 0}
    assert comparison["after"] == {"model": "tiny", "step": 300}
    assert json.loads((tmp_path / "step-000300/comparison.json").read_text()) == comparison


def test_only_files_that_both_have_are_compared(files, renderer, tmp_path):
    run(files, renderer, tmp_path, step=0, controls=False)
    run(files[:1], renderer, tmp_path, step=1)
    assert list(compare(tmp_path / "step-000000", tmp_path / "step-000001")["files"]) == ["mri"]
    run(files[1:], renderer, tmp_path, step=2)
    with pytest.raises(ValueError, match="share no file"):
        compare(tmp_path / "step-000001", tmp_path / "step-000002")


def test_other_rows_are_not_compared(files, renderer, tmp_path):
    run(files[:1], renderer, tmp_path, step=0)
    run([EvalFile("mri", files[0].examples[:-1])], renderer, tmp_path, step=1)
    with pytest.raises(ValueError, match=r"mri has other rows.*'7'.*eval\.limit"):
        compare(tmp_path / "step-000000", tmp_path / "step-000001")
    reworded = (dataclasses.replace(files[0].examples[0], question="Who?"), *files[0].examples[1:])
    run([EvalFile("mri", reworded)], renderer, tmp_path, step=2)
    with pytest.raises(ValueError, match="file mri has other rows"):
        compare(tmp_path / "step-000000", tmp_path / "step-000002")


def test_the_order_of_options_may_differ_between_compared_evaluations(files, renderer, tmp_path):
    run(files[:1], renderer, tmp_path, step=0)
    turned = tuple(
        dataclasses.replace(example, options=example.options[::-1], answer=3 - example.answer)
        for example in files[0].examples
    )
    run([EvalFile("mri", turned)], renderer, tmp_path, step=1)
    assert compare(tmp_path / "step-000000", tmp_path / "step-000001")["files"]["mri"]["correct_after"] == 8


def cells_of(table: Table, line: int) -> list[str]:
    return [list(column.cells)[line] for column in table.columns]


def test_the_table_shows_both_ends_with_their_controls(files, renderer, tmp_path):
    before, after = two_evaluations(files, renderer, tmp_path)
    table = summary_table(before, after, compare(tmp_path / "step-000000", tmp_path / "step-000300"))
    assert "step 0 → 300" in table.title
    assert cells_of(table, 1) == [
        "mri\n8 rows",
        "50.0 → 87.5\n22–78 → 53–98",
        "0.375",
        "100.0 → 100.0",
        "87.5\n53–98",
        "87.5\n53–98",
        "37.5\n14–69",
        "25.0\n0.0\nloo",
    ]


def caption(summary: EvalSummary) -> str:
    return str(summary_table(None, summary, None).caption)


def test_every_column_of_the_table_is_explained_below_it(files, renderer, tmp_path, caplog):
    with caplog.at_level("INFO"):
        summary = run(files, renderer, tmp_path)
    headings = [str(column.header).replace("\n", " ") for column in summary_table(None, summary, None).columns]
    assert headings[-4:] == ["blank", "shuffled", "other order", "chance prior"]
    assert "blank, shuffled: on a grey picture, on another row's" in caption(summary)
    assert "other order: with the options in another order" in caption(summary)
    assert "in the other rows of the file (loo, leave one out)" in caption(summary)
    assert re.search(r"needs 56 answers: 14 .*unchanged .* 14 .*grey .* 14 .*another", caplog.text)
    caplog.clear()
    with caplog.at_level("INFO"):
        fewer = run(files, renderer, tmp_path, controls=False, train_examples=files[1].examples, step=4)
    assert "loo" not in caption(fewer)
    assert "blank" not in caption(fewer)
    assert "prior: the option text most often right in the training rows" in caption(fewer)
    assert "answers" not in caplog.text


def test_a_letter_that_was_not_offered_is_in_the_format_and_is_said(files, renderer, tmp_path):
    few = [dataclasses.replace(row, options=row.options[:2], answer=0) for row in files[0].examples]
    # of the letters that are answered, C and D are none of these rows'
    expected = sum(LETTERS.index(row.letter) > 1 for row in files[0].examples)
    assert expected
    asked = {row.id: row.letter for row in files[0].examples}

    pool = ScriptedPool(renderer, lambda r, _: f"<think>…</think><answer>{asked[r.prompt.example.id]}</answer>")
    summary = run([EvalFile("mri", tuple(few)), files[1]], renderer, tmp_path, pool, controls=False)
    mri, ct = summary.files
    assert (mri.format_rate, mri.not_offered) == (1.0, expected / 8)
    assert ct.not_offered == 0
    assert EvalSummary.read(tmp_path / "step-000003") == summary
    assert f"mri: {100 * expected / 8:.1f} % answer a letter that was not offered" in caption(summary)
    assert "ct: " not in caption(summary)
    rows = [row for row in read_rows(tmp_path / "step-000003") if row.not_offered]
    assert len(rows) == expected
    assert not any(row.correct for row in rows)


def test_the_table_of_one_evaluation(files, renderer, tmp_path):
    summary = run(files, renderer, tmp_path, controls=False, train_examples=files[1].examples)
    cells = cells_of(summary_table(None, summary, None), 1)
    # nothing compared, no controls: no columns for them
    assert cells == ["ct\n6 rows", "100.0\n61–100", "100.0", "25.0\n33.3"]


def test_the_table_fits_a_narrow_terminal(files, renderer, tmp_path):
    before, after = two_evaluations(files, renderer, tmp_path)
    before = dataclasses.replace(
        before, files=tuple(dataclasses.replace(file, name="test_xray", rows=300) for file in before.files)
    )
    after = dataclasses.replace(
        after, files=tuple(dataclasses.replace(file, name="test_xray", rows=300) for file in after.files)
    )
    table = summary_table(before, after, {"files": {"test_xray": {"p_value": 1e-9}}})
    assert Console(width=200).measure(table).maximum <= 80
    assert cells_of(table, 0)[2] == "<0.001"


def test_the_run_folder_may_not_exist_yet(files, renderer, tmp_path):
    summary = run(files, renderer, tmp_path / "a/b", controls=False)
    assert EvalSummary.read(tmp_path / "a/b/step-000003") == summary
