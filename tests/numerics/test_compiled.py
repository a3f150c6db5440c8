"""Prompts and decode steps in compiled C++, at every width of vectors that this processor has."""

from __future__ import annotations

import dataclasses
import pwd
import stat

import pytest
import torch

from rlmed.core.types import RolloutRequest, SamplingParams
from rlmed.models.cpu import compiler
from rlmed.models.cpu.compiled_decoder import CompiledDecoder, CompiledProjection, sample
from rlmed.models.cpu.compiler import CompilerError, load_library, missing_library
from rlmed.models.decode_kernels import COMPILED, KernelKind, probe_layers, probe_sampler
from rlmed.models.decoder import Decoder
from rollout.native.sampler import BatchSampling
from tests.engine_runs import completions_of
from tests.plans import PLANS
from tests.rounding import LOGPROBS

pytestmark = pytest.mark.skipif(bool(missing_library()), reason=missing_library())

KIND = KernelKind(COMPILED, CompiledDecoder, sample)
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen2", "llama")


def flags_of() -> dict[str, str]:
    """Return the flag of this processor and of the narrower ones that it can run."""
    found = {"native": "-march=native", "sse2": "-march=x86-64"}
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or _has("avx2"):
        found["avx2"] = "-march=x86-64-v3"
    return found


def _has(feature: str) -> bool:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return any(feature in line.split() for line in lines if line.startswith("flags"))


@pytest.fixture(params=flags_of())
def isa(request, monkeypatch):
    """Compile for one kind of processor."""
    flags = tuple(flags_of()[request.param] if flag.startswith("-march") else flag for flag in compiler.FLAGS)
    monkeypatch.setattr(compiler, "FLAGS", flags)
    return request.param


def test_vectors_are_as_wide_as_the_processors(isa):
    assert load_library().rlmed_lanes() in {"sse2": (4,), "avx2": (8,), "native": (4, 8, 16)}[isa]


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (3, 7, 31), (8, 64, 32), (9, 33, 70), (17, 200, 129)]
)
@pytest.mark.parametrize("banned", [(), (0,)])
def test_products_are_those_of_float64(isa, rows, inputs, outputs, banned):
    generator = torch.Generator().manual_seed(rows)
    projection = torch.nn.Linear(inputs, outputs, bias=False)
    projection.weight = weight = torch.nn.Parameter(torch.randn(outputs, inputs, generator=generator))
    x = torch.randn(rows, inputs, generator=generator)
    found = CompiledProjection(projection, torch.tensor(banned, dtype=torch.int64))(x)
    exact = x.double() @ weight.detach().double().T
    exact[:, list(banned)] = float("-inf")
    # each of n products and sums rounds by at most 2^-24 of what is summed up
    bound = inputs * 2**-24 * (x.abs() @ weight.detach().abs().T).double()
    bound[:, list(banned)] = 0
    assert ((found.double() - exact).nan_to_num(0).abs() <= bound).all()
    assert found[:, list(banned)].isneginf().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_of_transformers(isa, family, tiny_policy):
    policy = tiny_policy(family)
    assert probe_layers(policy.model.get_decoder(), 3 if policy.family.vision else 1, KIND) == ""


def test_the_probe_rejects_another_epsilon(tiny_policy):
    def other(probed):
        decoder = Decoder(probed)
        decoder.layers = [
            dataclasses.replace(layer, mlp_norm=dataclasses.replace(layer.mlp_norm, epsilon=1e-5))
            for layer in decoder.layers
        ]
        return decoder

    assert "off by" in probe_layers(tiny_policy("qwen2_vl").model.get_decoder(), 3, KIND, other)


@pytest.mark.parametrize("plan", ["compiled", "compiled_pages"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_torchs_operators(isa, family, plan, fresh_policy, mixed_prompts):
    """Ragged groups, one of a single completion, prompts with images; free rows with pages."""
    settings = ({}, {"temperature": 0.7}, {"temperature": 0.0})
    requests = [
        RolloutRequest(i, prompt, (3, 1, 4)[i], SamplingParams(max_tokens=40 - 4 * i, seed=i, **settings[i]))
        for i, prompt in enumerate(mixed_prompts(family, 3))
    ]
    policy, torchs = fresh_policy(family), fresh_policy(family, compiled_decode=False)
    policy.end_token_ids = torchs.end_token_ids = frozenset()
    assert str(policy.decode_kernels()) == "compiled kernels"
    expected, actual = (completions_of(one, PLANS[plan], requests) for one in (torchs, policy))
    assert [one.token_ids.tolist() for one in actual] == [one.token_ids.tolist() for one in expected]
    assert max(len(one.token_ids) for one in actual) > 32  # more than one page
    for one, other in zip(actual, expected, strict=True):
        difference = torch.as_tensor(one.rollout_logprobs) - torch.as_tensor(other.rollout_logprobs)
        assert float(difference.abs().max()) < LOGPROBS


@pytest.mark.parametrize("vocabulary", [2, 127, 128, 129, 2500])
def test_the_sampler_draws_what_torchs_does(isa, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    rows = 300
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    logits[::2, 0] = float("-inf")
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    uniform[:4] = torch.tensor([0.0, 1 - 2**-53, 0.0, 1 - 2**-53])
    temperature = torch.tensor([1.0, 0.7, 1.3]).repeat(rows // 3)
    greedy = torch.arange(rows) % 5 == 4
    tokens, logprobs = sample(logits, uniform, temperature, greedy)
    torchs = BatchSampling(temperature.unsqueeze(1), greedy, None, None)
    expected, expected_logprobs = torchs.sample(logits, uniform)
    # an exponential that is rounded otherwise moves an interval's end by 1e-7, which few draws hit
    same = tokens == expected
    assert same.sum() >= rows - 1
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], atol=2e-6, rtol=1e-6)
    assert logits.gather(1, tokens.unsqueeze(1)).isfinite().all()
    assert probe_sampler(sample, max(vocabulary, 8), torch.device("cpu")) == ""


@pytest.mark.parametrize("strange", [float("nan"), float("inf")])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_row_of_logits_that_are_no_numbers_is_seen(strange, greedy):
    """By its log-probability, as with torch's sampler; the other rows are as they were."""
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    uniform, temperature = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64), torch.ones(3)
    asked = torch.full((3,), greedy)
    before = sample(logits, uniform, temperature, asked)
    logits[1, 200] = strange
    tokens, logprobs = sample(logits, uniform, temperature, asked)
    expected, expected_logprobs = BatchSampling(None, asked, None, None).sample(logits, uniform)
    assert logprobs.isnan().tolist() == expected_logprobs.isnan().tolist() == [False, True, False]
    assert not greedy or tokens[1] == expected[1] == 200
    assert 0 <= tokens[1] < 300 > expected[1] >= 0
    assert [entry[::2].tolist() for entry in (tokens, logprobs)] == [entry[::2].tolist() for entry in before]


def test_a_row_has_the_same_bits_in_any_company(fresh_policy, mixed_prompts):
    policy = fresh_policy("qwen2_vl")
    requests = [
        RolloutRequest(i, prompt, 5, SamplingParams(max_tokens=20, seed=i))
        for i, prompt in enumerate(mixed_prompts("qwen2_vl", 3))
    ]
    together = completions_of(policy, PLANS["compiled"], requests)
    alone = [one for request in requests for one in completions_of(policy, PLANS["compiled"], [request])]
    assert [one.rollout_logprobs.tolist() for one in together] == [one.rollout_logprobs.tolist() for one in alone]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Give the compiler a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    compiler._load.cache_clear()
    yield tmp_path
    compiler._load.cache_clear()


def test_a_library_is_compiled_once_for_each_processor(empty_cache, monkeypatch):
    assert missing_library() == ""
    made = list((empty_cache / "cache" / "rlmed").iterdir())
    assert [path.suffix for path in made] == [".so"]
    compiler._load.cache_clear()
    monkeypatch.setattr(compiler, "SOURCE", _copied(compiler.SOURCE, empty_cache / "again.cpp"))
    assert missing_library() == ""
    assert list((empty_cache / "cache" / "rlmed").iterdir()) == made
    (empty_cache / "again.cpp").write_text("int other() { return 1; }", encoding="utf-8")
    compiler._load.cache_clear()
    assert missing_library() == ""
    assert len(list((empty_cache / "cache" / "rlmed").iterdir())) == 2


def _copied(source, target):
    target.write_bytes(source.read_bytes())
    return target


def test_a_library_that_was_cut_off_is_compiled_again(empty_cache, caplog):
    path = compiler._cached(compiler._compiler(), compiler.FLAGS)  # not loaded: the loader knows files by name
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert missing_library() == ""
    assert str(path) in caplog.text
    assert path.read_bytes() == whole


@pytest.mark.parametrize("given", ["{wrapper} g++", "'{wrapper}' g++ -DUNUSED='a b'"])
def test_the_compiler_may_be_called_through_another_program(empty_cache, monkeypatch, given):
    wrapper = empty_cache / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$1" >> {empty_cache}/calls\nexec "$@"\n', encoding="utf-8")
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", given.format(wrapper=wrapper))
    assert missing_library() == ""
    assert (empty_cache / "calls").read_text().split() == ["g++"] * 3


def test_a_compiler_that_is_no_command_is_named(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "'g++")
    assert "CXX" in missing_library()


def test_a_cache_that_cannot_be_written_is_not_needed(empty_cache):
    (empty_cache / "cache").write_text("a file, not a folder", encoding="utf-8")
    assert missing_library() == ""
    assert len(list((empty_cache / "temporary").glob("*/*.so"))) == 1


@pytest.mark.parametrize("home", ["no home", "no access", "not there"])
def test_a_process_without_a_home_compiles_too(empty_cache, monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME")
    if home == "no home":
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    elif home == "no access":
        monkeypatch.setenv("HOME", f"/{'x' * 300}")  # too long, so that even root cannot look into it
    else:
        monkeypatch.setenv("HOME", str(empty_cache / "nobody"))
    assert missing_library() == ""
    assert not (empty_cache / "nobody").exists()
    assert len(list((empty_cache / "temporary").glob("*/*.so"))) == 1


def test_no_library_is_loaded_from_where_others_can_write(empty_cache):
    theirs = empty_cache / "cache" / "rlmed"
    assert missing_library() == ""
    theirs.chmod(0o777)
    planted = next(theirs.iterdir())
    planted.unlink()  # this process has loaded it: writing to it would crash it
    planted.write_text("not a library", encoding="utf-8")
    compiler._load.cache_clear()
    assert missing_library() == ""
    own = next((empty_cache / "temporary").iterdir())
    own.chmod(0o770)
    compiler._load.cache_clear()
    assert missing_library() == f"no folder to compile in: others can write to {own}"


def test_weights_whose_change_would_go_unnoticed_are_left_to_torch(fresh_policy):
    policy = fresh_policy("qwen2")
    with torch.inference_mode():
        copied = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
        policy.model.load_state_dict(copied, assign=True)
    kernels = policy.decode_kernels()
    assert not kernels.compiled
    assert "unnoticed" in str(kernels)


@pytest.mark.parametrize("part", ["mlp.down_proj", "input_layernorm"])
def test_weights_in_another_dtype_are_not_read(part, fresh_policy):
    decoder = fresh_policy("qwen2").model.get_decoder()
    decoder.layers[1].get_submodule(part).to(torch.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        CompiledDecoder(Decoder(decoder))


@pytest.mark.parametrize(
    ("script", "named"),
    [(None, "nothing_here"), ("echo 'no such flag' >&2; exit 1", "no such flag")],
    ids=["none", "fails"],
)
def test_without_a_working_compiler_torch_computes(empty_cache, monkeypatch, script, named, tiny_folder, caplog):
    path = empty_cache / "nothing_here"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(CompilerError, match=named):
        load_library()
    from rlmed.models.policy import load_policy

    kernels = load_policy(tiny_folder("qwen2")).decode_kernels()
    assert not kernels.compiled
    assert named in str(kernels)
