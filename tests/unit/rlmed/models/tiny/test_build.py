"""The offline models load as what they claim to be, and their tokenizer is fit for the domain."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from rlmed.models.tiny.build import SPECIAL_TOKENS, build_tiny, build_tiny_text, build_tiny_vl, train_tokenizer

CORPUS = ["<think>This is a T2-weighted MRI of the knee, option D.</think>\n<answer>D</answer>", "A) cyst\nB) mass"] * 3
PHRASE = "Your task: 1. Write <think>...</think>. 2. Stop."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, corpus=CORPUS, phrases=(PHRASE,), seed=3)
    return folder


def test_tiny_is_a_qwen2_vl_with_tied_embeddings_and_few_parameters(tiny):
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    assert json.loads((tiny / "config.json").read_text())["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id


def test_the_seed_decides_the_weights_and_leaves_the_global_stream_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_tiny_text(tmp_path / name, seed=seed)
    assert torch.equal(torch.rand(1), expected)
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight for name in "abc"]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("text", ["Größe 3 µm²\n\n\ttab", "肺窓 🫁", "a<b </ <answer>B</answer>", "", "\x00\u200b"])
def test_any_text_survives_the_tokenizer(tiny, text):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tags_domain_words_and_phrases_cost_one_token_each_and_letters_stand_alone(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer(PHRASE)["input_ids"]) == 1
    pieces = tokenizer.tokenize(f"<answer>D</answer>\n{PHRASE}")
    assert pieces[:3] == ["<answer>", "D", "</answer>"]
    assert len(pieces) == 5
    assert tokenizer.tokenize("T2-weighted")[0] != "T"
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == tokenizer(SPECIAL_TOKENS_TEXT)["input_ids"]


SPECIAL_TOKENS_TEXT = "".join(SPECIAL_TOKENS)


def test_a_system_turn_replaces_the_default_one(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A knee."},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nA knee.<|im_end|>\n"
    )


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "gemma3_text"])
def test_text_families_load_and_compute(tmp_path, family):
    build_tiny_text(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == family
    assert torch.isfinite(model(torch.arange(9).unsqueeze(0)).logits).all()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vision_families_load_and_see(tmp_path, family):
    build_tiny_vl(tmp_path, family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.config.model_type == family
    token_ids = torch.tensor([[1, *[model.config.image_token_id] * 16, 2]])
    grid = torch.tensor([[1, 8, 8]])
    with torch.no_grad():
        logits = [
            model(
                input_ids=token_ids,
                mm_token_type_ids=(token_ids == model.config.image_token_id).int(),
                pixel_values=torch.full((64, 6 * model.config.vision_config.patch_size**2), value),
                image_grid_thw=grid,
            ).logits[0, -1]
            for value in (0.0, 1.0)
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-5


def test_unknown_families_and_an_empty_corpus_are_errors(tmp_path):
    with pytest.raises(ValueError, match="gpt2"):
        build_tiny_text(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="llava"):
        build_tiny_vl(tmp_path, "llava")
    with pytest.raises(ValueError, match="corpus is empty"):
        train_tokenizer([], vocabulary=400)
