"""Questions to a model in the studio: the same answers as `rlmed.ask`, as they grow."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlmed import ask
from rlmed.core.parsing import evaluated_letter
from rlmed.data.phantom.studies import write_split
from rlmed.studio.asking import Asker, Question
from rlmed.studio.models import model_choices
from rlmed.studio.uploads import Uploads
from rlmed.studio.volumes import View
from tests.unit.rlmed.data.pictures import marked

OPTIONS = ("T1-weighted", "FLAIR", "T2-weighted", "proton-density")
QUESTION = "Which of these settings produced this image?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_split(folder, name="mri", modality="MRI", rows=1, seed=0)
    return next(folder.rglob("*.png"))


@pytest.fixture(scope="module")
def asker():
    uploads = Uploads()
    asker = Asker(uploads)
    yield asker
    asker.close()
    uploads.close()


def view_of(asker: Asker, path: Path) -> tuple[str, View]:
    async def pieces():
        yield path.read_bytes()

    name = asyncio.run(asker.uploads.receive(pieces()))
    (source,), _ = asker.uploads.open([name])
    return source, View()


def answered(asker: Asker, question: Question) -> list[dict[str, Any]]:
    async def events():
        return [dict(event) async for event in asker.answer(question)]

    return asyncio.run(events())


def text_of(events: list[dict[str, Any]], side: str) -> tuple[str, int]:
    """What a page that follows the events shows at last, and in how many pieces it came."""
    text, pieces = "", 0
    for event in events:
        if event.get("side") == side and "keep" in event:
            text = text.encode("utf-16-le")[: 2 * event["keep"]].decode("utf-16-le") + event["text"]
            pieces += 1
    return text, pieces


def test_an_answer_is_that_of_the_command_line_with_probabilities_and_a_control(asker, picture):
    events = answered(asker, Question("embedded:tiny_base", QUESTION, (view_of(asker, picture),), OPTIONS))
    assert events[-1] == {"done": True}
    assert any("embedded toy" in event.get("note", "") for event in events)
    text, pieces = text_of(events, "image")
    _, wanted = ask.ask(ask.parse_arguments([str(picture), QUESTION, "--options", *OPTIONS]))
    assert text == wanted
    assert pieces > 5
    said = {side: [event for event in events if event.get("side") == side] for side in ("image", "blank")}
    (answer,) = [event["answer"] for event in said["image"] if "answer" in event]
    assert answer["words"] == f"{evaluated_letter(wanted)}) {OPTIONS['ABCD'.index(evaluated_letter(wanted))]}"
    assert answer["reasoning"]
    assert answer["reasoning"] in wanted
    for side in ("image", "blank"):
        (options,) = [event["options"] for event in said[side] if "options" in event]
        assert [(one["letter"], one["text"]) for one in options] == list(zip("ABCD", OPTIONS, strict=True))
        for kind in ("direct", "after"):
            assert sum(one[kind] for one in options) == pytest.approx(1, abs=1e-9)
        if side == "image":
            assert max(options, key=lambda one: one["after"])["letter"] == evaluated_letter(wanted)
    assert text_of(events, "blank")[0] != text


def test_without_the_control_nothing_is_asked_over_a_blank_picture(asker, picture):
    question = Question("embedded:tiny_base", QUESTION, (view_of(asker, picture),), OPTIONS, max_tokens=4, blank=False)
    events = answered(asker, question)
    assert {event["side"] for event in events if "side" in event} == {"image"}
    (answer,) = [event["answer"] for event in events if "answer" in event]
    assert (answer["finish_reason"], answer["tokens"], answer["reasoning"]) == ("length", 4, None)
    (options,) = [event["options"] for event in events if "options" in event]
    assert [one["after"] for one in options] == [None] * 4


@pytest.mark.parametrize("pictured", [False, True])
def test_a_question_without_a_picture_says_so(asker, picture, pictured):
    views = (view_of(asker, picture),) if pictured else ()
    events = answered(asker, Question("embedded:tiny_base", QUESTION, views, OPTIONS, max_tokens=4, blank=False))
    assert events[-1] == {"done": True}
    assert any("without an image" in event.get("note", "") for event in events) != pictured


def test_boxes_are_fractions_of_the_picture(asker, tmp_path, monkeypatch, tiny_folder):
    from rlmed.data.prompts import PromptRenderer

    marked(size=(300, 200)).save(tmp_path / "a.png")
    monkeypatch.setattr(PromptRenderer, "decode", lambda *_: "<think>x</think><answer>[[100, 200, 500, 1000]]</answer>")
    question = Question(
        str(tiny_folder("qwen2_vl")), "Where?", (view_of(asker, tmp_path / "a.png"),), task="grounding", max_tokens=1
    )
    events = answered(asker, question)
    answers = [event["answer"] for event in events if "answer" in event]
    np.testing.assert_allclose(answers[0]["boxes"], [[0.1, 0.2, 0.5, 1.0]])
    assert "300x200: [[30, 40, 150, 200]]" in answers[0]["explained"]
    assert not any("toy" in event.get("note", "") for event in events)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": ("a",)}, "2 to 10 different texts"),
        ({"task": "grounding", "options": (), "views": ()}, "needs an image"),
        ({"task": "ground", "options": ()}, "did you mean grounding"),
        ({"temperature": -1.0}, r"Invalid temperature=-1\.0"),
        ({"modality": "CT"}, "modality CT has no effect"),
        ({"model": "none/such"}, "none/such"),
        ({"views": (("../x", View()),)}, "choose it again"),
    ],
)
def test_what_cannot_be_answered_costs_one_line(asker, picture, changes, said):
    asked = {
        "model": "embedded:tiny_base",
        "question": QUESTION,
        "views": (view_of(asker, picture),),
        "options": OPTIONS,
    }
    events = answered(asker, Question(**{**asked, **changes}))
    assert list(events[-1]) == ["error"]
    assert "\n" not in events[-1]["error"]
    assert re.search(said, events[-1]["error"])


def test_an_answer_that_nobody_waits_for_ends_and_the_next_is_whole(asker, picture):
    question = Question("embedded:tiny_base", QUESTION, (view_of(asker, picture),), OPTIONS)

    async def some():
        growing = asker.answer(question)
        async for event in growing:
            if "keep" in event:
                break
        await growing.aclose()
        return [dict(event) async for event in asker.answer(question)]

    events = asyncio.run(some())
    assert events[-1] == {"done": True}
    assert text_of(events, "image")[0].endswith("</answer>")


def test_two_questions_at_once_do_not_mix(asker, picture):
    views = (view_of(asker, picture),)
    questions = [Question("embedded:tiny_base", QUESTION, views, OPTIONS[:n], blank=False) for n in (4, 2)]

    async def both():
        async def one(question):
            return [dict(event) async for event in asker.answer(question)]

        return await asyncio.gather(*map(one, questions))

    together, alone = asyncio.run(both()), [answered(asker, question) for question in questions]
    assert [text_of(events, "image")[0] for events in together] == [text_of(events, "image")[0] for events in alone]
    assert any("waiting for 1" in event.get("state", "") for event in together[1])


def test_models_are_the_newest_checkpoints_the_given_ones_and_the_embedded_one(tmp_path, tiny_folder):
    for number, run in enumerate(("a", "b")):
        for step in (1, 2):
            folder = tmp_path / run / "checkpoints" / f"step-{step:06d}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            os.utime(folder, (1000 * number + step,) * 2)
    (tmp_path / "a" / "checkpoints" / ".step-000003.partial").mkdir()
    shutil.copytree(tiny_folder("llama"), tmp_path / "mine")
    choices = model_choices(
        {run: tmp_path / run / "checkpoints" for run in ("a", "b", "none")}, [str(tmp_path / "mine")]
    )
    names = [Path(choice.path).relative_to(tmp_path) if choice.path[0] == "/" else choice.path for choice in choices]
    checkpoints = [f"{run}/checkpoints/step-00000{step}" for run, step in (("b", 2), ("b", 1), ("a", 2), ("a", 1))]
    assert [str(name) for name in names] == ["mine", *checkpoints, "embedded:tiny_base"]
    assert len({choice.key for choice in choices}) == 6
    assert [choice.label for choice in choices[1:3]] == ["b, step 2", "b, step 1"]
    assert choices[-1].label.startswith("embedded")


def test_a_picture_of_several_is_asked_about_in_order(asker, tmp_path, tiny_folder):
    for number in (1, 2):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (60, 60), dtype=np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    views = tuple(view_of(asker, tmp_path / f"{number}.png") for number in (2, 1))
    question = Question(str(tiny_folder("qwen2_vl")), QUESTION, views, OPTIONS, max_tokens=3)
    _, wanted = ask.ask(
        ask.parse_arguments(
            [
                str(tmp_path / "2.png"),
                str(tmp_path / "1.png"),
                QUESTION,
                "--options",
                *OPTIONS,
                "--max-tokens",
                "3",
                "--model",
                question.model,
            ]
        )
    )
    assert text_of(answered(asker, question), "image")[0] == wanted
