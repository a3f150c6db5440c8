"""The model card: of multiple choice, of another task, and of several."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.evaluation.records import Accuracy
from rlmed.evaluation.results import EvalSummary, FileSummary, write_evaluation
from rlmed.evaluation.scores import Estimate, TaskSummary
from rlmed.export.card import model_card
from rlmed.export.card_tasks import MEANINGS
from rlmed.export.folder import Exported
from rlmed.export.source import Source
from rlmed.export.template import BEGIN, END, with_training_prompt
from rlmed.tasks.base import Task
from rlmed.tasks.registry import OWN

GOLDEN = Path(__file__).parent / "choice"
"""What multiple choice had before there were other tasks."""
SFT = "model:\n  path: models/Base\nsft:\n  epochs: 2\n"
PROMPTS: dict[str, Any] = {"template": "Look.\n{question}\nA letter.", "by_modality": {"CT": "CT: {question}"}}


@pytest.fixture
def make_card(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """`make_card("llama", ("choice",), tasks=summaries)`: the card of an SFT run."""

    def make(
        family: str,
        names: tuple[str, ...],
        tasks: tuple[TaskSummary, ...] = (),
        config: str = SFT,
        state: str = "{}",
        **prompts: Any,
    ) -> str:
        run = tmp_path / "run"
        checkpoint = run / "checkpoints" / "step-000005"
        checkpoint.mkdir(parents=True)
        for step, correct in ((0, 3), (5, 6)):
            file = FileSummary(
                name="ct",
                rows=10,
                accuracy=Accuracy.of(correct, 10),
                format_rate=1.0,
                mean_tokens=9.0,
                cut_by_length=0.0,
                chance=0.25,
                majority_letter=0.3 if "choice" in names else None,
                image_free_prior=0.3,
                image_free_prior_by_rate=0.3,
                leave_one_out_prior=0.3,
                leave_one_out_prior_by_rate=0.3,
                blank=Accuracy.of(2, 10),
                shuffled=Accuracy.of(1, 10),
                by_question_type={},
                tasks=tasks,
            )
            write_evaluation(run / "evaluations", EvalSummary("x", step, 1.0, 64, 0, (file,)), [])
        entry = {"rows": 10, "sha256": "0a", "tasks": list(names)}
        files = [{"name": "train", "path": "train.jsonl", **entry}, {"name": "ct", "path": "ct.jsonl", **entry}]
        (run / "data.json").write_text(json.dumps({"files": files}))
        (run / "versions.json").write_text(json.dumps({"packages": {"rlmed": "1.2.3"}}))
        (run / "config.yaml").write_text(config)
        (checkpoint / "trainer_state.json").write_text(state)
        renderer = PromptRenderer(*load_processor(tiny_folder(family)), max_prompt_tokens=512, **prompts)
        exported = Exported("float32", 1000, ("<end>",), (7,), renderer, 64, tasks=names)
        return model_card(Source(checkpoint, run, 5), exported, "mine", images=1)

    return make


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
def test_multiple_choice_keeps_its_card_and_template_byte_for_byte(
    make_card: Callable[..., str], tiny_folder: Callable[..., Path], family: str
) -> None:
    assert make_card(family, ("choice",), **PROMPTS) == (GOLDEN / f"{family}_card.txt").read_text()
    renderer = PromptRenderer(*load_processor(tiny_folder(family)), max_prompt_tokens=512, **PROMPTS)
    whole = with_training_prompt(renderer)
    assert whole.startswith(BEGIN)
    assert whole[: whole.index(END)] == (GOLDEN / f"{family}_template.txt").read_text()


IOU = TaskSummary(
    name="grounding",
    rows=10,
    main="iou",
    scores={"iou": Estimate(0.612, 0.55, 0.67)},
    over_file={"mAP": Estimate(0.333, 0.25, 0.41)},
    controls={"blank": {"iou": Estimate(0.211, 0.18, 0.24)}, "shuffled": {"iou": Estimate(0.201, 0.17, 0.23)}},
    chance={"iou": 0.171},
    own_prior={"iou": 0.222},
    prior=None,
)


def test_the_card_of_another_task_asks_its_question_and_has_its_scores(make_card: Callable[..., str]) -> None:
    prompt = "Look.\n{question}\nBoxes."
    card = make_card("qwen2_vl", ("grounding",), (IOU,), by_task={"grounding": prompt}, **PROMPTS)
    assert "the task `grounding`" in card
    assert "```text\nLook.\nWhere is the nodule?\nBoxes.\n```" in card
    assert "rlmed.ask image.png 'Where is the nodule?' --task grounding --model ." in card
    assert 'question = "Where is the nodule?"' in card
    assert "right from this score on: grounding iou 50." in card
    values = ["iou", "61.2 (55–67)", "**61.2 (55–67)**", "21.1 (18–24)", "20.1 (17–23)", "17.1", "22.2 own"]
    assert f"| ct | grounding | 10 | {' | '.join(values)} |" in card
    assert "| mAP | 33.3 (25–41) | 33.3 (25–41) | – | – | – | – |" in card
    assert "Chance is another row's right answer." in card
    words = ("--options", "option texts", "multiple", "A letter", "`modality`", "reordered")
    assert [word for word in words if word in card] == []
    assert len({line.count("|") for line in card.splitlines() if line.startswith(("| ct | 10", "| file | rows"))}) == 1


def test_the_card_says_what_the_scores_of_each_task_are(make_card: Callable[..., str]) -> None:
    scores = {"rouge_l": Estimate(0.4, 0.3, 0.5), "bleu": Estimate(0.2, 0.1, 0.3), "own": Estimate(0.2, 0.1, 0.3)}
    report = dataclasses.replace(IOU, name="report", main="rouge_l", scores=scores, over_file={}, controls={})
    card = make_card("qwen2_vl", ("choice", "grounding", "report"), (IOU, report))
    grounding, reported = (line for line in card.splitlines() if line.startswith(("- grounding: ", "- report: ")))
    assert [part.split(":")[0] for part in grounding.removeprefix("- grounding: ").split("; ")] == ["iou", "mAP"]
    assert re.fullmatch(r"- report: rouge_l: .*; bleu: [^;:]*\. Overlap of words .*", reported)
    assert "options reordered" in card
    assert "Chance is one of the options at random (of other tasks, another row's right answer)." in card
    assert "Options are reordered, and accuracy then counted, of\nmultiple choice alone." in card


@pytest.mark.parametrize("task", OWN)
def test_every_score_of_a_task_has_a_meaning(task: Task) -> None:
    if task.name != "choice":
        assert [score for score in task.score_names if (task.name, score) not in MEANINGS] == []


def test_a_single_row_has_no_chance_and_no_prior(make_card: Callable[..., str]) -> None:
    alone = dataclasses.replace(IOU, chance=None, own_prior=None)
    card = make_card("llama", ("grounding",), (alone,))
    assert "| 21.1 (18–24) | 20.1 (17–23) | – | – |" in card


def test_the_card_of_labels_gives_their_list(make_card: Callable[..., str]) -> None:
    card = make_card("llama", ("labels",), by_task={"labels": "{question}\nAll."})
    assert "```text\nWhich findings are shown?\neffusion, fracture, nodule\nAll.\n```" in card
    assert "--task labels --options effusion fracture nodule --model ." in card
    assert r'question = "Which findings are shown?\neffusion, fracture, nodule"' in card


def test_the_card_of_several_tasks_gives_each_whole_turn(make_card: Callable[..., str]) -> None:
    card = make_card("qwen2_vl", ("choice", "grounding"), (IOU,), by_task={"grounding": "{question} Boxes."}, **PROMPTS)
    turn = "Look.\nWhich body part is shown?\nA) head\nB) chest\nC) abdomen\nD) knee\nA letter."
    assert f"of the task choice:\n\n```text\n{turn}\n```" in card
    assert "of the task grounding:\n\n```text\nWhere is the nodule? Boxes.\n```" in card
    assert f"question = {json.dumps(turn)}" in card
    assert "training_prompt" not in card
    assert card.count("python -m rlmed.ask") == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "1 × format + 2 × choice + 1 × few_words"),
        (", few_words: 0.5", "1 × format + 2 × choice + 0.5 × few_words"),
    ],
)
def test_the_recipe_has_every_reward_with_its_weight(make_card: Callable[..., str], given: str, expected: str) -> None:
    reward = f"reward:\n  weights: {{format: 1, choice: 2{given}}}\n  extra: ['my_rewards:few_words']\n"
    config = f"model:\n  path: models/Base\nlearner: {{}}\n{reward}"
    card = make_card("llama", ("choice",), config=config, state='{"loop": {}}', **PROMPTS)
    assert f"| reward | {expected} |" in card


@pytest.mark.parametrize(("base", "cited"), [("models/Base", True), ("embedded:tiny_base", False)])
def test_only_a_base_with_a_card_is_cited(make_card: Callable[..., str], base: str, cited: bool) -> None:
    card = make_card("llama", ("choice",), config=f"model:\n  path: {base}\nsft:\n  epochs: 2\n", **PROMPTS)
    assert ("see the card of" in card) == cited
