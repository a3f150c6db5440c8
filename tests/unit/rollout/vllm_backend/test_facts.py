"""What the vLLM engine must know of a model, and pictures that vLLM would see otherwise."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rlmed.core.types import Example
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.models.families import family_of
from rlmed.models.policy import load_config
from tests.tiny_vision import TILE_FAMILIES

pytest.importorskip("vllm", reason="vllm is not installed")
from rollout.vllm_backend.engine import _model_facts
from rollout.vllm_backend.tiles import check_tiles, tile_facts

TAKEN = tuple(family for family in TILE_FAMILIES if family != "gemma3")


@pytest.fixture
def shown(tiny_folder):
    """`shown(family)`: a prompt with a picture of 40 x 64 pixels, and its model's facts."""

    def show(family):
        folder = tiny_folder(family)
        renderer = PromptRenderer(*load_processor(folder), max_prompt_tokens=512, template="{question}")
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 40, 3), dtype=np.uint8))
        prompt = renderer.render(Example("q1", None, "Which?", ("head", "chest"), answer=0), [picture])
        return prompt, tile_facts(load_config(folder))

    return show


def rules(tokens):
    """Stands in for vLLM's rules of LLaVA-OneVision, by which each picture has so many tokens."""
    return SimpleNamespace(get_num_image_tokens=lambda image_height, image_width: tokens)


def test_images_seen_in_both_directions_are_refused_with_what_to_do(tiny_folder):
    folder = tiny_folder("gemma3")
    with pytest.raises(ValueError, match=r"'gemma3' .*see earlier ones only.* use rollout=native"):
        _model_facts(folder, load_config(folder))


def test_patches_are_taken(tiny_folder):
    folder = tiny_folder("qwen3_vl")
    config = load_config(folder)
    facts = _model_facts(folder, config)
    assert (facts.image_token_id, facts.merge_size, facts.tiles) == (config.image_token_id, 2, None)


@pytest.mark.parametrize("family", TAKEN)
def test_tiles_are_taken_with_as_many_placeholders_as_vllm_makes_of_them(family, shown):
    prompt, facts = shown(family)
    placeholders = int((prompt.token_ids == facts.image_token_id).sum())
    check_tiles(prompt, facts, rules(placeholders))
    check_tiles(dataclasses.replace(prompt, token_ids=np.arange(3, 9), image_inputs={}), facts, rules(1))
    fewer = np.delete(prompt.token_ids, np.flatnonzero(prompt.token_ids == facts.image_token_id)[2])
    for broken in ({"token_ids": fewer}, {"image_inputs": {}}):
        made = 0 if "image_inputs" in broken else placeholders
        changed = dataclasses.replace(prompt, **broken)
        message = (
            f"'q1' has {int((changed.token_ids == facts.image_token_id).sum())} image placeholders, .* {made} visual"
        )
        with pytest.raises(ValueError, match=message):
            check_tiles(changed, facts, rules(placeholders))


def test_a_picture_that_vllm_cuts_otherwise_is_refused(shown):
    prompt, facts = shown("llava_onevision")
    written = int((prompt.token_ids == facts.image_token_id).sum())
    with pytest.raises(ValueError, match=f"{written} image placeholders, but vLLM makes {written + 2} "):
        check_tiles(prompt, facts, rules(written + 2))


def test_several_pictures_are_several_images_only_if_vllm_cuts_tiles_again(shown):
    pytest.importorskip("vllm")
    from rollout.vllm_backend.tiles import tile_items, tile_ranges

    for family, images in (("internvl", 1), ("llava_onevision", 2)):
        prompt, facts = shown(family)
        (places,) = np.nonzero(prompt.token_ids == facts.image_token_id)
        first, made = int(places[0]), 2 * 17 if images == 2 else 2 * 4  # 16 patches and one token to close; 4 tokens
        token_ids = np.full(first + made + 3, 5)
        token_ids[first : first + made] = facts.image_token_id
        pixels = np.stack([np.full((3, 28, 28), value, dtype=np.float32) for value in (1, 2)])
        inputs = {"pixel_values": pixels, "image_sizes": np.array([[64, 40], [30, 30]])}
        prompt = dataclasses.replace(prompt, token_ids=token_ids, image_inputs=inputs)
        check_tiles(prompt, facts, None)
        ranges, items = tile_ranges(prompt, facts), tile_items(prompt, facts)["image"]
        length = made // images
        assert [(own.offset, own.length) for own in ranges] == [(first + i * length, length) for i in range(images)]
        parts = [item["pixel_values"].data.flatten().unique().tolist() for item in items]
        assert parts == ([[1.0], [2.0]] if images == 2 else [[1.0, 2.0]])


def test_names_of_the_learner_become_vllms(tiny_folder):
    names = family_of(load_config(tiny_folder("llava_onevision"))).vllm_names
    ((pattern, new), _) = names
    for prefix in ("", "model."):  # in files and in the model
        old = f"{prefix}vision_tower.encoder.layers.0.mlp.fc1.bias"
        expected = f"{prefix}vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
        assert re.sub(pattern, new, old) == re.sub(pattern, new, expected) == expected
