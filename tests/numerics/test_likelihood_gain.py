"""What reasoning is worth, against padded transformers, the real tokenizer, one row at a time."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from learner.likelihood import completion_logprobs
from rewards.likelihood_gain import likelihood_gain
from rlmed.core.types import Completion, Example, Prompt, RolloutGroup, RolloutRequest, SamplingParams
from rlmed.data.prompts import PromptRenderer, load_processor
from tests.rounding import LOGPROBS

REASONINGS = ("ribs and lungs", "", "the head, not the chest\nso <answer>", "肺 <|im_end|> <|image_pad|>", "knee " * 30)


@pytest.mark.parametrize("token_budget", [1, 100_000])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2"])
def test_the_gain_is_that_of_the_padded_computation(
    family, token_budget, tiny_folder, tiny_policy, transformers_model, make_prompt, padded_logprobs
):
    plain = make_prompt(family, 1, length=20, grid=(8, 4) if family == "qwen2_vl" else None)
    example = Example(id="q", image=None, question="?", options=("head", "chest", "knee"), answer=2)
    prompt = Prompt(example, "", plain.token_ids, plain.image_inputs)
    texts = ["no format", *(f"<think>{reasoning}</think> <answer>A</answer>" for reasoning in REASONINGS)]
    blank = np.zeros(1, np.int64), np.zeros(1, np.float32)
    group = RolloutGroup(
        RolloutRequest(0, prompt, len(texts), SamplingParams()), tuple(Completion(*blank, t, "stop") for t in texts)
    )
    tokenizer, image_processor = load_processor(tiny_folder(family))
    renderer = PromptRenderer(tokenizer, image_processor, max_prompt_tokens=512)
    likelihood = functools.partial(completion_logprobs, tiny_policy(family), token_budget=token_budget)
    rewards = likelihood_gain(likelihood, renderer.split_common_prefix)(group)

    model = transformers_model(family).double()  # long texts, whose roundings would add up

    def right(reasoning: str) -> float:
        rows = [renderer.continuation_ids(f"<think>{reasoning.strip()}</think>\n<answer>{letter}") for letter in "ABC"]
        # tokens that all rows begin with cancel out in the softmax, so here they all count
        with torch.no_grad():
            totals = torch.stack([padded_logprobs(model, [(prompt, row)])[0].double().sum() for row in rows])
        return float(totals.log_softmax(0)[2])

    expected = [(right(reasoning) - right("")) / math.log(3) for reasoning in REASONINGS]
    assert max(map(abs, expected)) > 0.01
    # the letter with and without the reasoning: two logprobs of one token
    np.testing.assert_allclose(rewards, np.clip([0.0, *expected], -1, 1), atol=2 * LOGPROBS / math.log(3), rtol=0)
