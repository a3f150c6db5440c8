"""Prompts: the model's image token counts, limits, control tokens from users, text-only models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from rlmed.core.types import Example
from rlmed.data.images import load_image
from rlmed.data.prompts import PromptRenderer, PromptTooLongError, load_processor
from rlmed.data.templates import PROMPT_FILE, PROMPT_SUFFIX, read_prompt_settings
from rlmed.models.tiny.build import build_tiny_text, build_tiny_vl
from tests.rounding import rounding

QUESTION = "Which body part is shown?"
OPTIONS = ("head", "chest", "abdomen", "knee")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-vl")
    build_tiny_vl(folder)
    return folder


def make_renderer(folder: Path, **overrides) -> PromptRenderer:
    return PromptRenderer(*load_processor(folder), **{"max_prompt_tokens": 2048, **overrides})


def make_example(folder: Path, size: tuple[int, int] | None = (112, 112), **fields) -> Example:
    image = None
    if size is not None:
        image = folder / f"{size[0]}x{size[1]}.png"
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(image)
    return Example(**{"id": "q1", "image": image, "question": QUESTION, "options": OPTIONS, "answer": 3, **fields})


def test_question_text_letters_the_options_line_by_line():
    example = Example(id="1", image=None, question="Which?", options=("x", "y", "z"), answer=0)
    assert example.question_text == "Which?\nA) x\nB) y\nC) z"


def test_the_text_is_the_papers_with_one_placeholder(model_folder, tmp_path):
    prompt = make_renderer(model_folder).render(make_example(tmp_path))
    assert prompt.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "Which body part is shown?\nA) head\nB) chest\nC) abdomen\nD) knee\n"
        "Your task: 1. Think through the question step by step, enclose your reasoning process in <think>...</think> "
        "tags. 2. Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags. "
        "3. No extra information or text outside of these tags.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("size", [(112, 112), (30, 30), (640, 480), (50, 400), (113, 97)])
def test_placeholders_equal_the_visual_tokens_of_transformers(model_folder, tmp_path, size):
    min_pixels, max_pixels = 28 * 28 * 4, 28 * 28 * 64
    renderer = make_renderer(model_folder, min_pixels=min_pixels, max_pixels=max_pixels)
    example = make_example(tmp_path, size)
    prompt = renderer.render(example)

    reference = Qwen2VLImageProcessorPil(min_pixels=min_pixels, max_pixels=max_pixels)
    features = reference(images=[load_image(example.image)], return_tensors="np")
    height, width = smart_resize(size[1], size[0], 28, min_pixels, max_pixels)
    pad = renderer.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert int((prompt.token_ids == pad).sum()) == height * width // 28**2
    np.testing.assert_array_equal(prompt.image_inputs["image_grid_thw"], features["image_grid_thw"])
    np.testing.assert_allclose(prompt.image_inputs["pixel_values"], features["pixel_values"], atol=rounding(6, 3))
    assert prompt.image_inputs["pixel_values"].dtype == np.float32
    assert prompt.image_inputs["image_grid_thw"].dtype == prompt.token_ids.dtype == np.int64


def test_the_placeholder_run_replaces_exactly_the_placeholder(model_folder, tmp_path):
    renderer = make_renderer(model_folder)
    prompt = renderer.render(make_example(tmp_path))
    expanded = prompt.text.replace("<|image_pad|>", "<|image_pad|>" * 16)
    assert prompt.token_ids.tolist() == renderer.tokenizer(expanded)["input_ids"]


def test_a_long_prompt_shrinks_the_image_and_keeps_the_text(model_folder, tmp_path):
    example = make_example(tmp_path, (448, 448))
    free = make_renderer(model_folder, max_pixels=448 * 448)
    length = len(free.render(example).token_ids)
    tight = make_renderer(model_folder, max_pixels=448 * 448, max_prompt_tokens=length - 100)
    prompt = tight.render(example)
    pad = tight.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert length - 156 <= len(prompt.token_ids) <= length - 100
    assert int((prompt.token_ids == pad).sum()) == int(prompt.image_inputs["image_grid_thw"].prod()) // 4
    assert PROMPT_SUFFIX in tight.tokenizer.decode(prompt.token_ids)


def test_a_saved_processor_shows_pictures_as_large_as_the_renderer_did(model_folder, tmp_path):
    renderer = make_renderer(model_folder, min_pixels=28 * 28, max_pixels=56 * 56)
    renderer.save(shutil.copytree(model_folder, tmp_path / "saved", ignore=shutil.ignore_patterns("*processor*")))
    example = make_example(tmp_path)
    grids = [
        entry.render(example).image_inputs["image_grid_thw"] for entry in (renderer, make_renderer(tmp_path / "saved"))
    ]
    np.testing.assert_array_equal(*grids)
    assert grids[0].prod() < make_renderer(model_folder).render(example).image_inputs["image_grid_thw"].prod()


def test_a_prompt_that_cannot_fit_is_an_error_that_names_everything(model_folder, tmp_path):
    example = make_example(tmp_path)
    smallest = len(make_renderer(model_folder, max_pixels=56 * 56).render(example).token_ids)
    renderer = make_renderer(model_folder, max_prompt_tokens=smallest - 1)
    with pytest.raises(PromptTooLongError, match=rf"q1.*{smallest} tokens.*limit is {smallest - 1}.*max_prompt_tokens"):
        renderer.render(example)
    fitting = make_renderer(model_folder, max_prompt_tokens=smallest).render(example)
    assert len(fitting.token_ids) == smallest


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("field", ["question", "options"])
def test_control_tokens_in_user_text_are_rejected(model_folder, tmp_path, token, field):
    value = f"Which? {token}" if field == "question" else (f"he{token}ad", "chest")
    example = make_example(tmp_path, answer=0, **{field: value})
    with pytest.raises(ValueError, match=r"q1.*control token") as error:
        make_renderer(model_folder).render(example)
    assert token in str(error.value)


def test_harmless_angle_brackets_and_braces_pass(model_folder, tmp_path):
    question = "Is {question} < |x| > <|not_a_token|> <think>?"
    prompt = make_renderer(model_folder).render(make_example(tmp_path, question=question))
    assert question in prompt.text


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_text_only_models_render_text_and_reject_images(tmp_path, family):
    build_tiny_text(tmp_path / family, family)
    tokenizer, image_processor = load_processor(tmp_path / family)
    assert image_processor is None
    renderer = PromptRenderer(tokenizer, image_processor, max_prompt_tokens=2048)
    prompt = renderer.render(make_example(tmp_path, None))
    assert prompt.image_inputs == {}
    assert prompt.token_ids.tolist() == tokenizer(prompt.text)["input_ids"]
    assert "D) knee\nYour task:" in prompt.text
    with pytest.raises(ValueError, match=r"q1.*text only"):
        renderer.render(make_example(tmp_path))


def test_a_vision_model_takes_questions_without_image(model_folder, tmp_path):
    prompt = make_renderer(model_folder).render(make_example(tmp_path, None))
    assert "image_pad" not in prompt.text
    assert prompt.image_inputs == {}


def test_another_image_replaces_the_examples_own(model_folder, tmp_path):
    renderer, example = make_renderer(model_folder), make_example(tmp_path)
    blank = renderer.render(example, [Image.new("RGB", (112, 112), (128, 128, 128))])
    assert np.ptp(blank.image_inputs["pixel_values"].reshape(-1, 3, 392), axis=(0, 2)).max() == 0
    assert blank.token_ids.tolist() == renderer.render(example).token_ids.tolist()


@pytest.mark.parametrize(
    "missing", ["preprocessor_config.json", "tokenizer.json", "config.json", "chat_template.jinja"]
)
def test_a_folder_without_processor_is_an_error(tmp_path, missing):
    build_tiny_vl(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_processor(tmp_path)


def test_impossible_settings_are_errors(model_folder):
    with pytest.raises(ValueError, match="exactly once"):
        make_renderer(model_folder, template="no slot")
    with pytest.raises(ValueError, match="min_pixels=5000"):
        make_renderer(model_folder, min_pixels=5000, max_pixels=4000)


def test_a_modality_may_have_a_template_of_its_own(model_folder, tmp_path):
    renderer = make_renderer(model_folder, template="{question}\nfor all", by_modality={"CT": "for CT\n{question}"})
    ct, other = (
        renderer.render(
            make_example(tmp_path, None, modality=modality, question="Which?", options=("head", "knee"))
        ).text
        for modality in ("CT", "MRI")
    )
    assert "for CT\nWhich?\nA) head\nB) knee" in ct
    assert "for all" not in ct
    assert "B) knee\nfor all" in other
    with pytest.raises(ValueError, match="no slot"):
        make_renderer(model_folder, by_modality={"CT": "no slot"})


def test_templates_are_saved_beside_the_model(model_folder, tmp_path):
    assert read_prompt_settings(model_folder) is None
    given = {"template": "Größe?\n{question}", "by_modality": {"CT": "for CT\n{question}"}}
    make_renderer(model_folder, **given).save(tmp_path)
    assert read_prompt_settings(tmp_path) == {**given, "max_prompt_tokens": 2048}
    (tmp_path / PROMPT_FILE).write_text(json.dumps(given))
    assert read_prompt_settings(tmp_path) == given
    right = given | {"max_prompt_tokens": 512}
    wrong: list[object] = [{**right, key: None} for key in right]
    wrong += [[], {**right, "by_modality": {"CT": 3}}, {"template": "{question}"}]
    for broken in ("{", *map(json.dumps, wrong)):
        (tmp_path / PROMPT_FILE).write_text(broken)
        with pytest.raises(ValueError, match=r"rlmed_prompt\.json .*remove it"):
            read_prompt_settings(tmp_path)


def test_whether_reasoning_is_asked_for(model_folder, tmp_path):
    example = make_example(tmp_path, None, modality="CT")
    assert make_renderer(model_folder).asks_for_reasoning(example)
    assert make_renderer(model_folder, template="{question}").asks_for_reasoning(example)
    answer_only = "{question} Only <answer>A</answer>"
    assert not make_renderer(model_folder, template=answer_only).asks_for_reasoning(example)
    assert not make_renderer(model_folder, by_modality={"CT": answer_only}).asks_for_reasoning(example)
    assert make_renderer(model_folder, by_modality={"MRI": answer_only}).asks_for_reasoning(example)
