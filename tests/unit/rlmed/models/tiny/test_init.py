"""The two heads that the tiny model starts with look where they should."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from rlmed.models.tiny.build import build_tiny

TEXT = "A) small\nB) large\nC) medium\nD) no lesion\nThe size is large"
CORPUS = [TEXT, "<think>The size is small (A).</think>\n<answer>A</answer>"] * 3


@pytest.fixture(scope="module")
def attentions(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], tuple[torch.Tensor, ...]]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, corpus=CORPUS, phrases=(" no lesion",))
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(input_ids=encoded, output_attentions=True)
    return tokenizer.convert_ids_to_tokens(encoded[0]), output.attentions


def test_the_first_head_looks_at_the_previous_token(attentions):
    tokens, layers = attentions
    weights = layers[0][0, 0].diagonal(-1)
    assert len(weights) == len(tokens) - 1
    assert weights.mean() > 0.8
    others = layers[0][0, 2:].diagonal(-1, dim1=1, dim2=2)
    assert others.mean() < 0.4


def test_the_second_head_finds_the_earlier_occurrence_rather_than_itself(attentions):
    tokens, layers = attentions
    earlier, here = (index for index, token in enumerate(tokens) if token == "Ġlarge")
    weights = layers[1][0, 0, here]
    assert int(weights.argmax()) == earlier
    assert weights[earlier] > 5 * weights[here]
