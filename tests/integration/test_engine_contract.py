"""What every rollout engine keeps to, whatever samples inside it: see `rollout.engine.Engine`."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from rlmed.core.types import Example, RolloutRequest, SamplingParams
from rlmed.core.weights import WeightError
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.models.policy import load_policy
from rlmed.models.tiny.build import build_tiny_vl
from rlmed.models.weights import make_buckets
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits
from rollout.vllm_backend import environment
from tests.rounding import LOGPROBS, worst_difference

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"
)  # vLLM's own

MAX_COMPLETIONS = 8
MAX_PROMPT_TOKENS = 128
MAX_TOKENS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Qwen2-VL with heads of 32, vLLM's least on CPUs; many tokens end a completion."""
    folder = tmp_path_factory.mktemp("contract_model")
    build_tiny_vl(folder)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.hidden_size = config.vision_config.hidden_size = 128
    config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.generation_config.eos_token_id = [*model.generation_config.eos_token_id, *range(31, 46)]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def renderer(folder):
    return PromptRenderer(*load_processor(folder), max_prompt_tokens=MAX_PROMPT_TOKENS, template="{question}")


def _native(folder, renderer):
    limits = EngineLimits(max_completions=MAX_COMPLETIONS, max_prompt_tokens=MAX_PROMPT_TOKENS)
    yield NativeEngine(load_policy(folder), renderer.decode, limits)


def _vllm(folder, renderer):
    from rollout.vllm_backend.engine import VllmEngine
    from rollout.vllm_backend.settings import VllmSettings

    set_num_threads = torch.set_num_threads  # vLLM's CPU worker takes it away
    engine = VllmEngine(
        folder, VllmSettings("float32", MAX_COMPLETIONS, MAX_PROMPT_TOKENS, MAX_TOKENS, enforce_eager=True)
    )
    yield engine
    engine.close()
    torch.set_num_threads = set_num_threads


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(_native, id="native"),
        pytest.param(
            _vllm,
            id="vllm",
            marks=[
                pytest.mark.vllm,
                pytest.mark.slow,
                pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
            ],
        ),
    ],
)
def opened(request, folder, renderer):
    yield from request.param(folder, renderer)


@pytest.fixture
def engine(opened, weights):
    """Idle, with the folder's weights as version 0."""
    yield opened
    opened.abort()
    push(opened, weights, 0)


@pytest.fixture(scope="module")
def weights(folder):
    return {name: parameter.detach() for name, parameter in load_policy(folder).model.named_parameters()}


@pytest.fixture(scope="module")
def prompts(renderer):
    """Two with an image and two without."""
    rendered = []
    for i in range(4):
        rng = np.random.default_rng(i)
        image = Image.fromarray(rng.integers(0, 255, (56 + 28 * i, 84, 3), dtype=np.uint8)) if i % 2 else None
        rendered.append(
            renderer.render(Example(str(i), None, "Which?" * (1 + i), ("a", "b"), answer=0), image and [image])
        )
    return rendered


@pytest.fixture
def make_request(prompts):
    """`make_request(3, 2, max_tokens=5)`: request 3, of the third prompt, for two completions."""

    def make(index=0, group_size=1, **sampling):
        settings = {"seed": index, "max_tokens": 12, **sampling}
        return RolloutRequest(index, prompts[index % len(prompts)], group_size, SamplingParams(**settings))

    return make


def finish(engine):
    """All groups in the order in which they end."""
    groups = []
    while engine.busy:
        groups += engine.step()
    return groups


def push(engine, weights, version):
    """As a worker does it: in buckets, cut anywhere."""
    engine.update_weights(
        version, [copy.deepcopy(entry) for entry in make_buckets(weights.items(), bucket_bytes=40_000)]
    )


def tokens(group):
    return [completion.token_ids.tolist() for completion in group.completions]


def test_an_engine_without_work_does_nothing(engine):
    assert not engine.busy
    assert engine.step() == []
    assert engine.abort() == []


def test_each_request_comes_back_once_with_its_completions(engine, make_request, folder):
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    requests = [make_request(i, group_size=1 + i % 3, max_tokens=1 + 5 * i) for i in range(7)]
    for request in requests:  # more than fit at once
        engine.submit(request)
    assert engine.busy
    groups = finish(engine)
    assert not engine.busy
    assert sorted(group.request.index for group in groups) == list(range(7))
    reasons = set()
    for group in groups:
        assert group.request is requests[group.request.index]
        assert len(group.completions) == group.request.group_size
        for completion in group.completions:
            assert completion.token_ids.dtype == np.int64
            assert completion.rollout_logprobs.dtype == np.float32
            assert completion.token_ids.shape == completion.rollout_logprobs.shape
            assert np.isfinite(completion.rollout_logprobs).all()
            assert (completion.rollout_logprobs <= 0).all()
            # an end token is kept, and nothing comes after it
            stopped = [token in ends for token in completion.token_ids.tolist()]
            assert not any(stopped[:-1])
            assert completion.finish_reason == ("stop" if stopped[-1] else "length")
            assert stopped[-1] or len(stopped) == group.request.sampling.max_tokens
            reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_a_group_comes_back_with_the_step_in_which_its_last_completion_ends(engine, make_request):
    engine.submit(make_request(0, group_size=2, max_tokens=30, temperature=0.01))
    engine.submit(make_request(1, group_size=2, max_tokens=3))
    first, second = finish(engine)
    assert (first.request.index, second.request.index) == (1, 0)


def test_sampled_tokens_are_counted_as_they_come(engine, make_request):
    start = engine.generated_tokens
    engine.submit(make_request(0, group_size=3, max_tokens=8))
    engine.submit(make_request(1, group_size=2, max_tokens=4))
    counts, groups = [], []
    while engine.busy:
        groups += engine.step()
        counts.append(engine.generated_tokens - start)
    assert counts[0] == 5
    assert counts == sorted(counts)
    assert counts[-1] == sum(len(ids) for group in groups for ids in tokens(group))


def test_work_that_is_dropped_comes_back_as_requests(engine, make_request):
    requests = [make_request(i, group_size=4, max_tokens=30, temperature=0.01) for i in range(4)]
    for request in requests:
        engine.submit(request)
    engine.submit(make_request(9, group_size=2))
    engine.step()
    engine.step()
    dropped = engine.abort()
    assert sorted(request.index for request in dropped) == [0, 1, 2, 3, 9]
    assert all(request in dropped for request in requests)
    assert not engine.busy
    engine.submit(make_request(5))
    (group,) = finish(engine)
    assert group.request.index == 5


def test_a_completion_depends_on_its_seed_and_number_alone(engine, make_request):
    engine.submit(make_request(0, group_size=4))
    (alone,) = finish(engine)
    assert len({tuple(ids) for ids in tokens(alone)}) > 1
    for request in (make_request(1, group_size=3), make_request(0, group_size=4), make_request(2)):
        engine.submit(request)
    among = {group.request.index: group for group in finish(engine)}
    assert worst_difference([alone], [among[0]]) < LOGPROBS
    engine.submit(make_request(0, group_size=2))
    (fewer,) = finish(engine)
    first_two = dataclasses.replace(alone, completions=alone.completions[:2])
    assert worst_difference([first_two], [fewer]) < LOGPROBS


def test_greedy_completions_of_a_group_are_the_same(engine, make_request):
    engine.submit(make_request(0, group_size=3, temperature=0.0))
    (group,) = finish(engine)
    one, *others = (dataclasses.replace(group, completions=(entry,)) for entry in group.completions)
    assert all(worst_difference([one], [other]) < LOGPROBS for other in others)


@pytest.mark.parametrize(
    ("group_size", "sampling", "message"),
    [
        (0, {}, "group_size must be at least 1, got 0"),
        (MAX_COMPLETIONS + 1, {}, "exceeds rollout.max_completions=8"),
        (1, {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_what_can_never_run_is_refused(engine, make_request, group_size, sampling, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(make_request(0, group_size, **sampling))
    assert not engine.busy


def test_prompts_longer_than_the_limit_or_empty_are_refused(engine, prompts, make_request):
    for length in (0, MAX_PROMPT_TOKENS + 1):
        prompt = type(prompts[0])(prompts[0].example, "", np.full(length, 40, dtype=np.int64))
        with pytest.raises(ValueError, match=rf"\b{length} tokens.*\b{MAX_PROMPT_TOKENS}\b"):
            engine.submit(RolloutRequest(0, prompt, 1, SamplingParams(max_tokens=4)))
    assert not engine.busy


def test_new_weights_change_what_is_sampled_and_old_ones_bring_it_back(engine, make_request, weights):
    def sample():
        for i in range(4):
            engine.submit(make_request(i, group_size=2))
        return [tokens(group) for group in sorted(finish(engine), key=lambda group: group.request.index)]

    before = sample()
    push(engine, {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}, 1)
    assert engine.policy_version == 1
    assert all(one != other for one, other in zip(before, sample(), strict=True))
    push(engine, weights, 2)
    assert sample() == before


def test_completions_say_which_versions_they_are_of(engine, make_request, weights):
    engine.submit(make_request(0, group_size=2, max_tokens=10, temperature=0.01))
    for _ in range(2):
        engine.step()
    push(engine, weights, 4)
    engine.submit(make_request(1, temperature=0.01))
    across, after = sorted(finish(engine), key=lambda group: group.request.index)
    assert {(c.min_version, c.max_version) for c in across.completions if len(c.token_ids) > 2} == {(0, 4)}
    assert [(c.min_version, c.max_version) for c in after.completions] == [(4, 4)]
    assert engine.policy_version == 4


def test_weights_of_another_model_are_refused(engine, make_request, weights):
    name, tensor = next(iter(weights.items()))
    for wrong in ((f"{name}.more", tensor), (name, tensor[:1])):
        with pytest.raises(WeightError, match=name):
            push(engine, dict([wrong]), 4)
    engine.submit(make_request(0))
    assert len(finish(engine)) == 1


def test_without_vllm_the_message_names_what_to_install(monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'\.\[ray,vllm\]'"):
        environment.import_vllm()
