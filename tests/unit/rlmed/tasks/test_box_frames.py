"""Boxes in thousandths or in pixels of the picture as shown: prompts, truth, judging, records."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from rewards.task import task_reward
from rlmed.cluster.engines import make_renderer, recorded_renderer
from rlmed.core.config.composing import compose_config
from rlmed.core.types import Completion, Example, RolloutGroup, RolloutRequest
from rlmed.data.examples import read_examples
from rlmed.data.loading import EvalFile
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.data.templates import PROMPT_FILE, read_prompt_settings
from rlmed.evaluation.faithfulness import measure_faithfulness
from rlmed.evaluation.results import read_rows
from rlmed.evaluation.run import Evaluator
from rlmed.export.card_tasks import box_units
from rlmed.export.template import with_training_prompt
from rlmed.sft_run import Batches
from rlmed.tasks.registry import task_of

SIZES = ((400, 300), (150, 500))
BOX = (0.25, 0.2, 0.75, 0.6)  # of each picture


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Example, ...]:
    """Questions about pictures of different sizes, in whose same parts the box lies."""
    lines = []
    for width, height in SIZES:
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{width}.png")
        box = [x * side for x, side in zip(BOX, (width, height) * 2, strict=True)]
        lines.append({"task": "grounding", "image": f"{width}.png", "question": "Where is it?", "answer": [box]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_examples(tmp_path / "rows.jsonl").examples


def renderer_of(folder: Path, **settings: Any) -> PromptRenderer:
    defaults = {"max_prompt_tokens": 2048, "box_frame": "pixels"}
    if settings.get("box_frame", "pixels") == "pixels":
        defaults |= {"min_pixels": 28 * 28, "max_pixels": 1000 * 1000}
    return PromptRenderer(*load_processor(folder), **defaults | settings)


def in_frame(size: tuple[int, int]) -> list[float]:
    return [x * side for x, side in zip(BOX, size * 2, strict=True)]


def said(answer: object) -> str:
    return f"<think>I look.</think><answer>{answer}</answer>"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_pixels_are_those_of_the_picture_after_the_processors_resizing(
    tiny_folder: Callable[..., Path], rows: tuple[Example, ...], family: str
) -> None:
    limits = {"min_pixels": 56 * 56, "max_pixels": 280 * 280}
    renderer = renderer_of(tiny_folder(family), **limits)
    factor = {"qwen2_5_vl": 28, "qwen3_vl": 32}[family]
    for example, (width, height) in zip(rows, SIZES, strict=True):
        prompt = renderer.render(example)
        rows_, columns = smart_resize(height, width, factor, *limits.values())
        assert prompt.example.truth == {"boxes": [list(BOX)], "frame": [columns, rows_]}
        assert (columns, rows_) != (width, height)
        assert prompt.image_inputs["pixel_values"].shape[0] == columns * rows_ * 4 // factor**2
        assert "[[x0, y0, x1, y1], ...] in pixels of the image ([] if there is nothing to find)" in prompt.text
        assert "thousandths" not in prompt.text
        task = task_of(prompt.example)
        assert json.loads(task.right_answer(prompt.example)) == [[round(x) for x in in_frame((columns, rows_))]]
        tokens = np.arange(3)
        completion = Completion(tokens, tokens.astype(np.float32), said([in_frame((columns, rows_))]), "stop")
        assert task_reward(prompt.example, completion) == pytest.approx(1, abs=1e-12)
        assert task_reward(example, completion) < 0.5  # the row itself is in thousandths


def test_a_picture_that_shrinks_to_its_prompts_limit_has_the_smaller_size_as_frame(
    tiny_folder: Callable[..., Path], rows: tuple[Example, ...]
) -> None:
    folder = tiny_folder("qwen2_5_vl")
    whole = renderer_of(folder).render(rows[0])
    small = renderer_of(folder, max_prompt_tokens=len(whole.token_ids) - 60).render(rows[0])
    assert whole.example.truth["frame"] == [392, 308]
    width, height = small.example.truth["frame"]
    assert width * height // 28**2 == int(small.image_inputs["image_grid_thw"].prod()) // 4 <= 14 * 11 - 60


def test_thousandths_leave_prompt_and_row_as_they_are(
    tiny_folder: Callable[..., Path], rows: tuple[Example, ...]
) -> None:
    prompt = renderer_of(tiny_folder("qwen2_vl"), box_frame="thousandths").render(rows[0])
    assert prompt.example is rows[0]
    assert "in thousandths of the image's width and height ([]" in prompt.text


@pytest.mark.parametrize("name", ["paper", "answer_only", "short"])
def test_every_prompt_that_is_shipped_says_pixels(tiny_folder: Callable[..., Path], rows: Any, name: str) -> None:
    prompt = compose_config("train", [f"prompt={name}"]).prompt
    renderer = renderer_of(
        tiny_folder("qwen2_5_vl"), template=prompt.template, by_modality=prompt.by_modality, by_task=prompt.by_task
    )
    text = renderer.render(rows[0]).text
    assert "[[x0, y0, x1, y1], ...] in pixels" in text
    assert "thousandths" not in text


def test_tiles_have_no_pixels(tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(
        ValueError, match=r"box_frame=pixels: the model's Idefics3ImageProcessor .*box_frame=thousandths"
    ):
        renderer_of(tiny_folder("idefics3"), min_pixels=None, max_pixels=None)


def test_a_model_keeps_the_units_of_its_training_and_else_has_its_familys(
    tiny_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def frame(folder: Path, *entries: str, **options: Any) -> str:
        config = compose_config("evaluate", ["data=jsonl", f"model.path={folder}", *entries])
        return make_renderer(config.model, config.data, config.prompt, **options).templates.box_frame

    old, new = (shutil.copytree(tiny_folder("qwen2_5_vl"), tmp_path / name) for name in ("old", "new"))
    assert frame(old) == recorded_renderer(old).templates.box_frame == "pixels"
    assert frame(old, "data.box_frame=thousandths") == "thousandths"
    for family in ("qwen2_vl", "qwen3_vl", "internvl", "gemma3"):
        assert recorded_renderer(tiny_folder(family)).templates.box_frame == "thousandths"
    recorded_renderer(new).save(new)
    renderer_of(old, box_frame="thousandths").save(old)
    # as earlier versions, which had thousandths alone, wrote it
    assert "box_frame" not in json.loads((old / PROMPT_FILE).read_text())
    assert read_prompt_settings(new)["box_frame"] == "pixels"
    assert frame(old) == recorded_renderer(old).templates.box_frame == "thousandths"
    assert frame(new) == recorded_renderer(new).templates.box_frame == "pixels"
    assert frame(tiny_folder("qwen2_5_vl"), checkpoint=old) == "thousandths"  # a resumed run stays as it was
    assert "was trained with" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert frame(old, "data.box_frame=pixels") == "pixels"
    assert "was trained with data.box_frame=thousandths, not pixels" in caplog.text
    (new / PROMPT_FILE).write_text(json.dumps({"template": "{question}", "by_modality": {}, "box_frame": "inches"}))
    with pytest.raises(ValueError, match="'inches'"):
        read_prompt_settings(new)


class Pool:
    """Answers at once with the right box of the picture that is shown."""

    def __init__(self) -> None:
        self.waiting: list[RolloutRequest] = []

    @property
    def in_flight(self) -> int:
        return len(self.waiting)

    def submit(self, request: RolloutRequest) -> None:
        self.waiting.append(request)

    def collect(self) -> RolloutGroup:
        request = self.waiting.pop()
        _, height, width = (request.prompt.image_inputs["image_grid_thw"][0] * 14).tolist()
        text = said([[round(x) for x in in_frame((width, height))]])
        tokens = np.arange(3)
        return RolloutGroup(request, (Completion(tokens, tokens.astype(np.float32), text, "stop"),))


def test_an_evaluation_judges_each_answer_in_pixels_of_the_picture_that_was_shown(
    tiny_folder: Callable[..., Path], rows: tuple[Example, ...], tmp_path: Path
) -> None:
    evaluator = Evaluator(
        files=[EvalFile("f", rows)], pool=Pool(), renderer=renderer_of(tiny_folder("qwen2_5_vl")), folder=tmp_path,
        train_examples=rows, max_tokens=32, model="tiny",
    )  # fmt: skip
    (file,) = evaluator.evaluate(0, controls=True).files
    (task,) = file.tasks
    # whole pixels of 14 by 11 or 5 by 18 times 28
    assert task.scores["iou"].value == pytest.approx(1, abs=0.02)
    assert task.controls["shuffled"]["iou"].value == pytest.approx(1, abs=0.02)
    assert task.prior["iou"] == pytest.approx(1, abs=0.02)
    records = {(row.id, row.control): row for row in read_rows(tmp_path / "step-000000")}
    frames = {key: row.truth["frame"] for key, row in records.items()}
    own = [frames[example.id, "none"] for example in rows]
    assert own == [[392, 308], [140, 504]]
    assert [frames[example.id, "shuffled"] for example in rows] == own[::-1]
    assert json.loads(records[rows[0].id, "none"].answer) == [[round(x) for x in in_frame((392, 308))]]
    # the same part of both pictures: the same answer, though its numbers are others
    (found,) = measure_faithfulness(list(records.values()))
    assert found.image_sensitivity.correct == 0


def test_the_target_of_fine_tuning_is_in_pixels(
    tiny_folder: Callable[..., Path], rows: tuple[Example, ...], caplog: pytest.LogCaptureFixture
) -> None:
    renderer = renderer_of(tiny_folder("qwen2_5_vl"))
    batches = Batches(rows, renderer, compose_config("sft", ["sft.batch_size=2", "sft.epochs=1"]))
    texts = {renderer.decode(item.sequences[0].completion.token_ids.tolist()) for item in batches.batch(0)}
    assert f"<answer>[[{', '.join(str(round(x)) for x in in_frame((392, 308)))}]]</answer>" in texts
    assert "data.box_frame" not in caplog.text
    written = (dataclasses.replace(rows[0], completion=said([[250, 200, 750, 600]])), rows[1])
    Batches(written, renderer, compose_config("sft", ["sft.batch_size=2", "sft.epochs=1"]))
    assert "1 of 2 training rows have boxes in a completion of their own" in caplog.text


def test_an_exported_chat_template_asks_for_pixels_and_the_card_says_which(tiny_folder: Callable[..., Path]) -> None:
    renderer = renderer_of(tiny_folder("qwen2_5_vl"))
    assert "in pixels of the image" in with_training_prompt(renderer, "grounding")
    assert "pixels of the image as the image processor resizes it" in box_units(renderer, ("open", "grounding"))
    assert box_units(renderer, ("open",)) == ""
    assert box_units(renderer_of(tiny_folder("qwen2_5_vl"), box_frame="thousandths"), ("grounding",)) == ""
