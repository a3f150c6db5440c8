"""The probabilities of option letters, against transformers' own computation of each whole text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlmed.core.types import LETTERS, Example
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.evaluation.option_likelihood import letter_probabilities
from tests.rounding import LOGPROBS

TEXTS = ("<think>the chest, it is bright</think><answer>", "<answer>", "<think>\n<|im_end|> </think> <answer>")


def joined_tokenizer(**special):
    """Qwen2 joins ">" with a letter after it; this tokenizer does so for A and C, not B and D."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, ">A", ">C", "an"])}
    core = Tokenizer(models.BPE(vocabulary, [(">", "A"), (">", "C"), ("a", "n")]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(r"[^\r\n\p{L}\p{N}]?\p{L}+", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", **special)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    path = tmp_path_factory.mktemp("pictures") / "0.png"
    pixels = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return [
        Example(id=str(count), image=path if count != 4 else None, question="Which?", options=tuple("wxyzv"[:count]), answer=1)
        for count in (2, 4, 5)
    ]  # fmt: skip


@pytest.mark.parametrize("token_budget", [1, 100_000])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_they_are_those_of_transformers(
    family, token_budget, examples, tiny_folder, tiny_policy, transformers_model, padded_logprobs
):
    renderer = PromptRenderer(*load_processor(tiny_folder(family)), max_prompt_tokens=512)
    cases = [(renderer.render(example), text) for example in examples for text in TEXTS]
    found = list(letter_probabilities(cases, policy=tiny_policy(family), renderer=renderer, token_budget=token_budget))
    # the texts are long, and their roundings would add up
    model = transformers_model(family).double()
    tokens = len(renderer.continuation_ids("A</answer>"))
    for (prompt, text), probabilities in zip(cases, found, strict=True):
        rows = []
        for letter in LETTERS[: len(prompt.example.options)]:
            ids = renderer.tokenizer(f"{text}{letter}</answer>", add_special_tokens=False, split_special_tokens=True)
            rows.append((prompt, np.array(ids["input_ids"])))
        with torch.no_grad():
            whole = torch.stack([entry.sum() for entry in padded_logprobs(model, rows)])
        # the tokens before the letter are the same in all, so they cancel; p(1 - p) is 1/4 at most
        np.testing.assert_allclose(probabilities, whole.softmax(0).numpy(), atol=tokens * LOGPROBS / 4, rtol=0)
        assert probabilities.sum() == pytest.approx(1)
    # a model that is indifferent would show nothing
    assert max(entry.max() for entry in found) > 0.4


def test_texts_part_where_their_tokens_do():
    renderer = PromptRenderer(joined_tokenizer(), None, max_prompt_tokens=64)
    tokenizer = renderer.tokenizer
    shared, endings = renderer.split_common_prefix([f"an<answer>{letter}</answer>" for letter in "ABCD"])
    assert tokenizer.decode(shared) == "an<answer"
    starts = [tokenizer.convert_ids_to_tokens(ids[:2].tolist()) for ids in endings]
    assert starts == [[">A", "<"], [">", "B"], [">C", "<"], [">", "D"]]
    for letter, ending in zip("ABCD", endings, strict=True):
        assert tokenizer.decode(np.concatenate([shared, ending])) == f"an<answer>{letter}</answer>"


def test_a_text_that_begins_another_is_refused():
    renderer = PromptRenderer(joined_tokenizer(), None, max_prompt_tokens=64)
    with pytest.raises(ValueError, match="'<answer>B', '<answer>BB' cannot be told"):
        renderer.split_common_prefix(["<answer>B", "<answer>BB"])


def test_a_control_token_that_a_completion_spells_out_is_plain_text(tiny_folder):
    renderer = PromptRenderer(*load_processor(tiny_folder("qwen2_vl")), max_prompt_tokens=64)
    shared, _ = renderer.split_common_prefix(["<|image_pad|>A", "<|image_pad|>B"])
    assert renderer.tokenizer.convert_tokens_to_ids("<|image_pad|>") not in shared
    assert renderer.tokenizer.decode(shared) == "<|image_pad|>"
