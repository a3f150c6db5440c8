"""Pictures by a model's own rules: the tokens and pixels of transformers' processor, and no more of
them than fit.
"""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from rlmed.cluster.engines import open_model
from rlmed.core.types import Example
from rlmed.data.pictures import load_pictures
from rlmed.data.prompts import PromptRenderer, PromptTooLongError, load_processor
from rlmed.models.policy import load_config
from tests.conftest import GRID_FAMILIES, VISION_FAMILIES
from tests.tiny_vision import TILE_FAMILIES

SIZES = ((112, 112), (300, 40), (64, 128), (57, 61), (20, 30))
EXAMPLE = Example("q1", None, "Which body part is shown?", ("head", "chest"), answer=0)


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def renderer(folder, **settings):
    return PromptRenderer(*open_model(folder), **{"max_prompt_tokens": 1024, "template": "{question}", **settings})


@pytest.fixture
def num2words(monkeypatch):
    """SmolVLM's processor in transformers cannot be made without this library, nor some others
    without one for videos.
    """
    pytest.importorskip("torchvision", reason="transformers' own processors need it, for videos")
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", str)


@pytest.mark.parametrize("family", TILE_FAMILIES)
def test_tokens_and_pixels_are_those_of_transformers_own_processor(family, tiny_folder, num2words):
    folder = tiny_folder(family)
    own = renderer(folder)
    whole = AutoProcessor.from_pretrained(folder)
    # pixels by the same library
    whole.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    lengths = set()
    for size in SIZES:
        prompt = own.render(EXAMPLE, [picture(size)])
        expected = whole(text=[prompt.text], images=[[picture(size)]], return_tensors="np", add_special_tokens=False)
        assert prompt.token_ids.tolist() == expected["input_ids"][0].tolist()
        pixels = prompt.image_inputs["pixel_values"]
        np.testing.assert_array_equal(pixels, expected["pixel_values"].reshape(-1, *pixels.shape[1:]))
        lengths.add(len(prompt.token_ids))
    assert len(lengths) > 1 or family == "gemma3"  # which has one size for all


def processor_of(folder, family):
    """transformers' own processor; of the Qwen-VL families, without its part for videos."""
    if family in TILE_FAMILIES:
        whole = AutoProcessor.from_pretrained(folder)
        whole.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        return whole
    return open_model(folder)[1]._rules


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("sizes", [((112, 112), (300, 40)), ((57, 61),) * 2, SIZES])
def test_several_pictures_are_those_of_transformers_own_processor_in_their_order(family, sizes, tiny_folder, num2words):
    folder, shown = tiny_folder(family), [picture(size, seed) for seed, size in enumerate(sizes)]
    prompt = renderer(folder).render(EXAMPLE, shown)
    whole = processor_of(folder, family)
    assert prompt.text.count(whole.image_token) == len(sizes)
    assert prompt.text.rindex(whole.image_token) < prompt.text.index("Which body part")
    expected = whole(text=[prompt.text], images=[shown], return_tensors="np", add_special_tokens=False)
    assert prompt.token_ids.tolist() == expected["input_ids"][0].tolist()
    pixels = prompt.image_inputs["pixel_values"]
    np.testing.assert_array_equal(pixels, expected["pixel_values"].reshape(-1, *pixels.shape[1:]))
    for name in prompt.image_inputs.keys() - {"pixel_values"}:
        np.testing.assert_array_equal(prompt.image_inputs[name], expected[name])
    turned = renderer(folder).render(EXAMPLE, shown[::-1])
    assert not np.array_equal(turned.image_inputs["pixel_values"], pixels)


@pytest.mark.parametrize("family", GRID_FAMILIES)
def test_the_largest_pictures_shrink_first_and_together(family, tiny_folder):
    folder, sizes = tiny_folder(family), ((112, 112), (112, 112), (32, 64), (84, 112))
    shown = [picture(size, seed) for seed, size in enumerate(sizes)]
    free = renderer(folder, min_pixels=28 * 28).render(EXAMPLE, shown)
    merge = open_model(folder)[1].image_processor.merge_size ** 2
    before = free.image_inputs["image_grid_thw"].prod(axis=1) // merge
    for fewer in range(1, before.sum() - 4 * before[2] + 1, 5):
        prompt = renderer(folder, min_pixels=28 * 28, max_prompt_tokens=len(free.token_ids) - fewer).render(
            EXAMPLE, shown
        )
        tokens = prompt.image_inputs["image_grid_thw"].prod(axis=1) // merge
        assert len(free.token_ids) - len(prompt.token_ids) == before.sum() - tokens.sum() >= fewer
        assert tokens[2] == before[2]
        assert tokens[0] == tokens[1]
        # those that shrank were larger than any is now
        assert all(before[tokens < before] > tokens.max())


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_several_pictures_shrink_until_they_fit_or_are_refused_with_numbers(family, tiny_folder):
    folder, shown = tiny_folder(family), [picture((112, 112), seed) for seed in range(3)]
    lengths = [len(renderer(folder).render(EXAMPLE, shown).token_ids)]
    while True:
        tight = renderer(folder, max_prompt_tokens=lengths[-1] - 1)
        try:
            prompt = tight.render(EXAMPLE, shown)
        except PromptTooLongError as error:
            refused = str(error)
            break
        assert len(prompt.token_ids) < lengths[-1]
        lengths.append(len(prompt.token_ids))
    # of several pictures, these families make one tile each, whatever their size
    assert (len(lengths) == 1) == (family in ("gemma3", "llava_onevision"))
    one = len(tight.tokenizer(tight.pictures.prepare(shown[:1]).texts[0], add_special_tokens=False)["input_ids"])
    found = re.search(
        r"q1: .* has (\d+) tokens, (\d+) of them for 3 images, which have at least (\d+) each, .*limit is (\d+): .*"
        r"data\.max_prompt_tokens",
        refused,
    )
    total, visual, least, limit = map(int, found.groups())
    assert (total, limit) == (lengths[-1], lengths[-1] - 1)
    assert visual == 3 * least <= 3 * one


def test_too_many_pictures_are_refused_with_numbers(tiny_folder):
    folder, shown = tiny_folder("qwen2_vl"), [picture((57, 61), seed) for seed in range(3)]
    own = renderer(folder, max_images=2)
    assert own.render(EXAMPLE, shown[:2]).image_inputs["image_grid_thw"].shape == (2, 3)
    with pytest.raises(ValueError, match=r"example q1: .* 3 images, and data\.max_images=2"):
        own.render(EXAMPLE, shown)
    with pytest.raises(ValueError, match="example q1: it has 3 images, but the model reads text"):
        renderer(tiny_folder("llama")).render(EXAMPLE, shown)


IMAGE = "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{{- '<|image_pad|>' }}", r"q1: .* its 2 images without a token between"),
        ("{%- if loop.first %}" + IMAGE + "{%- endif %}", r"writes 1 image placeholders .* where 2 belong"),
    ],
)
def test_a_template_that_cannot_write_several_pictures_is_refused_when_there_are_several(tiny_folder, written, message):
    own, shown = renderer(tiny_folder("qwen2_vl")), [picture((57, 61), seed) for seed in range(2)]
    assert IMAGE in own.tokenizer.chat_template
    own.tokenizer.chat_template = own.tokenizer.chat_template.replace(IMAGE, written)
    assert own.render(EXAMPLE, shown[:1]).image_inputs
    with pytest.raises(ValueError, match=message):
        own.render(EXAMPLE, shown)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_long_prompt_takes_fewer_tiles_or_pixels_and_keeps_its_text(family, tiny_folder):
    folder = tiny_folder(family)
    free, shown = renderer(folder), picture((112, 112))
    length = len(free.render(EXAMPLE, [shown]).token_ids)
    if family == "gemma3":
        with pytest.raises(PromptTooLongError, match=f"{length} tokens.*limit is {length - 1}"):
            renderer(folder, max_prompt_tokens=length - 1).render(EXAMPLE, [shown])
        return
    lengths = [length]
    while True:
        tight = renderer(folder, max_prompt_tokens=lengths[-1] - 1)
        try:
            prompt = tight.render(EXAMPLE, [shown])
        except PromptTooLongError:
            break
        assert len(prompt.token_ids) < lengths[-1]
        assert "Which body part is shown?" in tight.tokenizer.decode(prompt.token_ids)
        lengths.append(len(prompt.token_ids))
    assert len(lengths) > 1


@pytest.mark.parametrize("family", TILE_FAMILIES)
def test_a_saved_renderer_shows_the_same_and_transformers_loads_it(family, tiny_folder, tmp_path, num2words):
    saved = tmp_path / "saved"
    saved.mkdir()
    own = renderer(tiny_folder(family))
    own.save(saved)
    (saved / "config.json").write_bytes((tiny_folder(family) / "config.json").read_bytes())
    again = PromptRenderer(*load_processor(saved), max_prompt_tokens=1024, template="{question}")
    prompts = [each.render(EXAMPLE, [picture((64, 128))]) for each in (own, again)]
    assert prompts[0].token_ids.tolist() == prompts[1].token_ids.tolist()
    loaded = AutoProcessor.from_pretrained(saved)
    ids = loaded(text=[prompts[0].text], images=[[picture((64, 128))]], add_special_tokens=False)["input_ids"][0]
    assert list(ids) == prompts[0].token_ids.tolist()


def test_limits_in_pixels_are_refused_where_a_model_has_tiles(tiny_folder):
    with pytest.raises(ValueError, match=r"max_pixels=9000.*SmolVLMImageProcessor.*data\.max_prompt_tokens"):
        renderer(tiny_folder("smolvlm"), max_pixels=9000)


def test_an_image_processor_of_another_kind_is_refused(tiny_folder, tmp_path):
    for file in tiny_folder("internvl").glob("*.json"):
        text = file.read_text().replace("GotOcr2ImageProcessor", "LlavaOnevisionImageProcessor")
        (tmp_path / file.name).write_text(text)
    with pytest.raises(ValueError, match=r"of a LlavaOnevisionImageProcessor .* not of a GotOcr2ImageProcessor: copy"):
        load_processor(tmp_path)


def test_videos_need_no_library_and_transformers_stays_as_it_is(tiny_folder, monkeypatch):
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    folder = tiny_folder("smolvlm")
    tokenizer, _ = load_processor(folder)
    pictures = load_pictures(folder, load_config(folder), tokenizer)
    assert pictures.placeholder == "<image>"
    assert processing_smolvlm.num2words is None
    assert "num2words" not in sys.modules or sys.modules["num2words"] is not None
