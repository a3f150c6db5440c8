"""How likely a policy finds written completions, against a padded transformers computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.likelihood import completion_logprobs
from tests.rounding import LOGPROBS


@pytest.mark.parametrize("token_budget", [1, 200, 100_000])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2"])
def test_they_are_those_of_the_padded_computation(
    family, token_budget, tiny_policy, transformers_model, make_train_groups, padded_logprobs
):
    questions = [
        (group.rollout.prompt, [completion.token_ids for completion in group.rollout.completions])
        for group in make_train_groups(family, 4)
    ]
    questions.insert(1, (questions[0][0], []))  # nothing to score is no error, and shifts nothing
    scored = completion_logprobs(tiny_policy(family), questions, token_budget=token_budget)
    assert [len(entry) for entry in scored] == [len(completions) for _, completions in questions]
    rows = [(prompt, token_ids) for prompt, completions in questions for token_ids in completions]
    with torch.no_grad():
        expected = padded_logprobs(transformers_model(family), rows)
    found = [entry for group in scored for entry in group]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other.numpy(), atol=LOGPROBS, rtol=0)
