"""What the vLLM engine must know of a model, and the models whose pictures it cannot take."""

from __future__ import annotations

import pytest

from rlmed.models.policy import load_config
from rollout.vllm_backend.engine import _model_facts
from tests.tiny_vision import TILE_FAMILIES


@pytest.mark.parametrize("family", TILE_FAMILIES)
def test_tiles_are_refused_with_what_to_do(family, tiny_folder):
    folder = tiny_folder(family)
    with pytest.raises(ValueError, match=rf"'{family}' cannot be handed over to vLLM .* use rollout=native"):
        _model_facts(folder, load_config(folder))


def test_patches_are_taken(tiny_folder):
    folder = tiny_folder("qwen3_vl")
    config = load_config(folder)
    facts = _model_facts(folder, config)
    assert (facts.image_token_id, facts.merge_size) == (config.image_token_id, 2)
