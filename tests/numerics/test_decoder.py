"""The decoder for sampling against transformers' modules: the same numbers, refused where they
would not be, few operators.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlmed.core.config.checks import PRODUCT_USES
from rlmed.core.types import RolloutRequest, SamplingParams
from rlmed.models.attention import ATTENTION_NAME, PackedLayout
from rlmed.models.cpu import products
from rlmed.models.cpu.linear import PackedWeights
from rlmed.models.decoder import accept_decoder
from rlmed.models.loading import model_folder
from rlmed.models.policy import load_policy
from rollout.native.engine import NativeEngine
from tests.rounding import LOGPROBS, worst_difference

ACCEPTED = ("qwen2_vl", "qwen2_5_vl", "qwen2", "llama")
LENGTHS = (7, 1, 12)
OPERATORS_A_STEP = 400
"""For four layers, sampler included; transformers' modules with our fused parts dispatched 569."""
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor")
needs_onednn = pytest.mark.skipif(not products.has_onednn(), reason="this torch has no oneDNN")


def hidden_states(policy, seed=0):
    """Of ragged rows: a group of two completions and a prompt alone."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, 300, (sum(LENGTHS) + 4,), generator=generator)
    rows = 3 if policy.family.vision else 1
    positions = torch.randint(0, 90, (rows, len(tokens)), generator=generator)
    layout = PackedLayout.build([(LENGTHS[0], (LENGTHS[1], LENGTHS[2])), (4, ())])
    return policy.hidden(tokens, positions, layout)


def both(policy):
    """Hidden states by transformers' modules and by the decoder for sampling."""
    with torch.no_grad():
        expected = hidden_states(policy)
    with torch.inference_mode(), PackedWeights().active():
        return expected, hidden_states(policy)


@pytest.mark.parametrize("uses", [(), PRODUCT_USES], ids=["torch", "onednn"])
@pytest.mark.parametrize("family", ACCEPTED)
def test_hidden_states_are_those_of_transformers(family, uses, tiny_policy, monkeypatch):
    if uses and not products.has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products._Choice, "uses", frozenset(uses))
    policy = tiny_policy(family)
    assert policy.decoder is not None
    expected, actual = both(policy)
    # a few layers of sums of some hundred products, normed to about 1
    torch.testing.assert_close(actual, expected, atol=LOGPROBS, rtol=0)
    assert not torch.equal(actual, expected)  # it is not the same computation


@pytest.mark.parametrize("family", ACCEPTED)
def test_in_bfloat16_both_are_equally_far_from_float32(family, fresh_policy):
    half, exact = fresh_policy(family, dtype="bfloat16"), fresh_policy(family)
    assert half.decoder is not None
    with torch.no_grad():
        for parameter, rounded in zip(exact.model.parameters(), half.model.parameters(), strict=True):
            parameter.copy_(rounded)
    true = both(exact)[0]
    theirs, ours = ((states - true).abs().mean() for states in both(half))
    assert ours < 1.2 * theirs


def test_prompts_with_images_take_the_decoder_too(tiny_policy, mixed_prompts, monkeypatch):
    policy, taken = tiny_policy("qwen2_vl"), []
    prompt = next(one for one in mixed_prompts("qwen2_vl", 6) if one.image_inputs)
    monkeypatch.setattr(type(policy.decoder), "__call__", counted(type(policy.decoder).__call__, taken))
    length = len(prompt.token_ids)
    arguments = (
        torch.as_tensor(prompt.token_ids),
        policy.prompt_positions(prompt),
        PackedLayout.build([(length, ())]),
        policy.image_inputs(prompt),
    )
    with torch.no_grad():
        expected = policy.hidden(*arguments)
    assert not taken
    with torch.inference_mode():
        actual = policy.hidden(*arguments)
    assert taken == [length]
    torch.testing.assert_close(actual, expected, atol=LOGPROBS, rtol=0)


def counted(call, taken):
    def counting(self, embeddings, position_ids, layout):
        taken.append(len(embeddings))
        return call(self, embeddings, position_ids, layout)

    return counting


def test_norms_of_queries_and_keys_are_refused_by_name(tiny_policy):
    assert tiny_policy("qwen3").decoder is None


def llama(**settings):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**{"vocab_size": 50, "num_key_value_heads": 2, **sizes, **settings})
    config._attn_implementation = ATTENTION_NAME
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("settings", "accepted"),
    [
        ({}, True),
        ({"attention_bias": True, "mlp_bias": True}, True),
        ({"head_dim": 12}, True),
        ({"hidden_act": "gelu"}, False),
        ({"hidden_act": "relu"}, False),
    ],
    ids=str,
)
def test_only_a_model_that_computes_the_same_is_accepted(settings, accepted, caplog):
    with caplog.at_level(logging.INFO):
        decoder = accept_decoder(llama(**settings), position_rows=1)
    assert (decoder is not None) is accepted
    assert ("a probe differs" in caplog.text) is not accepted


def test_one_layer_of_another_kind_is_found(caplog):
    model = llama(num_hidden_layers=5)
    model.model.layers[3].mlp.act_fn = torch.nn.Tanh()
    with caplog.at_level(logging.INFO):
        assert accept_decoder(model, position_rows=1) is None
    assert "a probe differs" in caplog.text


def test_the_probe_changes_nothing(tiny_folder):
    policy = load_policy(tiny_folder("qwen2"), dtype="bfloat16")
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.bfloat16}
    assert len(policy.model.base_model.layers) == policy.kv_shape[0]


def run(policy, prompts):
    engine = NativeEngine(policy, lambda _: "")
    for index, prompt in enumerate(prompts):
        engine.submit(RolloutRequest(index, prompt, 3, SamplingParams(seed=index, max_tokens=12)))
    groups = []
    while engine.busy:
        groups += engine.step()
    return sorted(groups, key=lambda group: group.request.index)


@pytest.mark.parametrize("family", ACCEPTED)
def test_tokens_are_those_without_it(family, fresh_policy, mixed_prompts):
    policy = fresh_policy(family, compiled_decode=False)
    actual = run(policy, mixed_prompts(family, 7))
    policy.decoder = None
    vars(policy.model.get_decoder()).pop("forward")
    assert worst_difference(run(policy, mixed_prompts(family, 7)), actual, policy) < LOGPROBS


@pytest.mark.parametrize("uses", [(), PRODUCT_USES], ids=["torch", "onednn"])
def test_a_change_of_weights_is_seen_at_once(uses, fresh_policy, monkeypatch):
    if uses and not products.has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products._Choice, "uses", frozenset(uses))
    policy, packs = fresh_policy("qwen2"), PackedWeights()
    with torch.inference_mode(), packs.active():
        before = hidden_states(policy)
    for parameter in policy.model.get_decoder().layers.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.5)
        with torch.inference_mode(), packs.active():
            assert not torch.equal(hidden_states(policy), before)
        with torch.no_grad():
            parameter.copy_(kept)
    with torch.inference_mode(), packs.active():
        assert torch.equal(hidden_states(policy), before)


class Dispatched(TorchDispatchMode):
    """Names of the operators that reach torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.append(str(function))
        return function(*arguments, **(named or {}))


@needs_onednn
@pytest.mark.parametrize("uses", [PRODUCT_USES[:2], PRODUCT_USES], ids=["as it is", "packed"])
def test_a_step_dispatches_few_operators_and_none_that_waits_for_the_device(uses, monkeypatch, make_request_of):
    monkeypatch.setattr(products._Choice, "uses", frozenset(uses))
    policy = load_policy(model_folder("embedded:tiny_base"), onednn=uses, compiled_decode=False)
    policy.end_token_ids = frozenset()
    engine = NativeEngine(policy, lambda _: "")
    for index in range(3):
        engine.submit(make_request_of(index))
    for _ in range(3):
        engine.step()
    with Dispatched() as dispatched:
        engine.step()
    assert len(dispatched.names) < OPERATORS_A_STEP
    assert not [name for name in dispatched.names if any(word in name for word in SYNCHRONISING)]


@pytest.fixture
def make_request_of(make_prompt):
    """Requests of text for the embedded model, whose first ids are ordinary text."""

    def make(index):
        prompt = make_prompt("qwen2", index, length=9 + 5 * index)
        return RolloutRequest(index, prompt, 4, SamplingParams(seed=index, max_tokens=12))

    return make
