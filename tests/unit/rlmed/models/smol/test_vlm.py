"""A vision-language model around a Llama: what it keeps, what is new, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from rlmed.core.types import Example, RolloutRequest, SamplingParams
from rlmed.data.phantom.reports import studies_of
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.models.families import unsampleable_token_ids
from rlmed.models.policy import load_policy
from rlmed.models.smol.vlm import VISION_TOKENS, build_vlm, mrope_section
from rlmed.models.smol.words import teach_words
from rlmed.models.tiny.build import build_tiny_text
from rlmed.models.tiny.toy import SHIPPED
from rollout.native.engine import NativeEngine
from tests.rounding import LOGPROBS
from tests.smol_text import write_llama

TOWER = SHIPPED / "tiny_base"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text model and the vision-language model around it."""
    text = write_llama(tmp_path_factory.mktemp("text"))
    folder = tmp_path_factory.mktemp("vlm")
    build_vlm(text, TOWER, folder)
    return text, folder


@pytest.mark.parametrize("tied", [True, False])
def test_text_logits_are_those_of_the_text_model(tied: bool, tmp_path: Path) -> None:
    text = write_llama(tmp_path / "text", tied=tied)
    build_vlm(text, TOWER, tmp_path / "vlm")
    llama = AutoModelForCausalLM.from_pretrained(text)
    vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
    token_ids = torch.randint(3, llama.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, actual = llama(token_ids).logits, vlm(token_ids).logits
    known = llama.config.vocab_size
    torch.testing.assert_close(actual[..., :known], expected, atol=LOGPROBS, rtol=0)
    assert expected.std() > 0.1  # random weights say something
    assert actual.shape[-1] == known + len(VISION_TOKENS)


def test_new_tokens_are_single_and_in_the_configuration(folders: tuple[Path, Path]) -> None:
    text, folder = folders
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoModelForImageTextToText.from_pretrained(folder).config
    known = len(AutoTokenizer.from_pretrained(text))
    for name, token in VISION_TOKENS.items():
        (token_id,) = tokenizer(f"{token}")["input_ids"]
        assert token_id >= known
        assert getattr(config, name) == token_id


def test_the_tower_is_the_given_one(folders: tuple[Path, Path]) -> None:
    own, given = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model.visual.state_dict()
        for folder in (folders[1], TOWER)
    )
    assert {name for name in own if not torch.equal(own[name], given[name])} == {
        "merger.mlp.2.weight",
        "merger.mlp.2.bias",
    }


def test_greedy_answers_about_pictures_are_those_of_generate(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[1], tmp_path / "vlm")
    renderer = PromptRenderer(*load_processor(folder), max_prompt_tokens=400, template="{question}")
    rng = np.random.default_rng(0)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    # visual tokens as large as words, so that the picture matters
    model.model.visual.merger.mlp[2].weight.data.mul_(30)
    model.save_pretrained(folder)
    prompts = [
        renderer.render(
            Example(str(i), None, f"Which part {i}?", ("knee", "head"), answer=0),
            [Image.fromarray(rng.integers(0, 255, (112, 112, 3), dtype=np.uint8))],
        )
        for i in range(4)
    ]
    engine = NativeEngine(load_policy(folder), renderer.decode)
    for index, prompt in enumerate(prompts):
        engine.submit(RolloutRequest(index, prompt, 1, SamplingParams(temperature=0.0, max_tokens=12)))
    answers = {}
    while engine.busy:
        answers |= {group.request.index: group.completions[0].token_ids.tolist() for group in engine.step()}
    for index, prompt in enumerate(prompts):
        token_ids = torch.from_numpy(prompt.token_ids)[None]
        with torch.inference_mode():
            written = model.generate(
                input_ids=token_ids,
                mm_token_type_ids=(token_ids == model.config.image_token_id).int(),
                **{name: torch.from_numpy(array) for name, array in prompt.image_inputs.items()},
                do_sample=False,
                max_new_tokens=12,
                suppress_tokens=list(unsampleable_token_ids(model.config)),
            )
        assert answers[index] == written[0, len(prompt.token_ids) :].tolist()
    assert len({tuple(answer) for answer in answers.values()}) > 1


def test_visual_tokens_learn_to_be_words(folders: tuple[Path, Path]) -> None:
    """Four pictures by heart: each visual token lies nearest to the embedding of its word."""
    _, pictures = load_processor(folders[1])
    model = AutoModelForImageTextToText.from_pretrained(folders[1], dtype=torch.float32)
    assert pictures is not None
    inputs = [pictures.prepare([picture]).inputs for _, picture in studies_of(0, 0, 4)]
    pixels, grids = (
        torch.from_numpy(np.concatenate([one[name] for one in inputs])) for name in ("pixel_values", "image_grid_thw")
    )
    words = torch.randint(10, 20, (4, 16), generator=torch.Generator().manual_seed(0))
    language = {name: tensor.clone() for name, tensor in model.model.language_model.state_dict().items()}
    shares: list[float] = []
    teach_words(
        model,
        lambda step: (pixels, grids, words),
        100,
        words=range(10, 20),
        lr=3e-3,
        on_step=lambda step, loss, share: shares.append(share),
    )
    assert shares[0] < 0.4  # ten words
    assert shares[-1] > 0.95
    assert all(torch.equal(language[name], tensor) for name, tensor in model.model.language_model.state_dict().items())


def test_rows_of_visual_tokens_read_like_lines() -> None:
    assert mrope_section(64) == [1, 1, 30]
    assert sum(mrope_section(16)) == 8


def test_what_is_no_llama_is_refused(tmp_path: Path) -> None:
    build_tiny_text(tmp_path / "qwen3", "qwen3")
    with pytest.raises(ValueError, match="qwen3"):
        build_vlm(tmp_path / "qwen3", TOWER, tmp_path / "vlm")
