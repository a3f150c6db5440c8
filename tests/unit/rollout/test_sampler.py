"""Random streams and the draw: reference values, distributions, filters against slow ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rlmed.core.types import SamplingParams
from rollout.native.sampler import BatchSampling, completion_seeds, mix64, uniforms
from tests.rounding import rounding

MASK = 2**64 - 1
INT64 = st.integers(-(2**63), 2**63 - 1)
CPU = torch.device("cpu")
ROUNDING = rounding(12, 4)
"""A log-softmax of eight logits between -3 and 2, a few roundings each."""
LOGITS = torch.tensor([0.5, -1.0, -math.inf, 2.0, 0.0, 1.2, -3.0, -math.inf])


def reference_mix64(value):
    """splitmix64 in unbounded integers."""
    z = (value + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def unsigned(tensor):
    return [value & MASK for value in tensor.tolist()]


def sampling(rows=1, vocabulary=8, **params):
    return BatchSampling.build([SamplingParams(**params)] * rows, vocabulary, CPU)


def numbers(seeds, step=0):
    return uniforms(torch.as_tensor(seeds), torch.full((len(seeds),), step))


def draws(count, logits=LOGITS, **params):
    """Tokens of `count` streams."""
    batch = sampling(count, len(logits), **params)
    return batch.sample(logits.expand(count, -1), numbers(completion_seeds(1, count)))


def test_mix64_gives_the_published_splitmix64_sequence():
    # the first outputs of splitmix64 for seed 1234567, as on rosettacode.org and in Vigna's
    # reference implementation
    golden = 0x9E3779B97F4A7C15
    state = [(1234567 + i * golden) & MASK for i in range(5)]
    signed = torch.tensor([value - 2**64 if value >= 2**63 else value for value in state])
    assert unsigned(mix64(signed)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert unsigned(mix64(torch.zeros(1, dtype=torch.int64))) == [0xE220A8397B1DCDAF]


@given(st.lists(INT64, min_size=1, max_size=20))
def test_mix64_is_the_reference_on_any_integer(values):
    assert unsigned(mix64(torch.tensor(values))) == [reference_mix64(value & MASK) for value in values]


@given(INT64, st.integers(1, 64))
def test_completion_seeds_are_distinct_and_do_not_depend_on_the_group_size(seed, group_size):
    seeds = completion_seeds(seed, group_size)
    assert len(set(seeds.tolist())) == group_size
    assert torch.equal(seeds, completion_seeds(seed, group_size + 5)[:group_size])


def test_streams_of_neighbouring_groups_do_not_overlap():
    seeds = torch.cat([completion_seeds(seed, 16) for seed in range(1000)])
    assert len(set(seeds.tolist())) == 16_000


@given(INT64, INT64)
def test_uniforms_are_in_the_unit_interval_and_exact(seed, step):
    value = uniforms(torch.tensor([seed]), torch.tensor([step])).item()
    assert 0.0 <= value < 1.0
    assert value == (reference_mix64((seed ^ reference_mix64(step & MASK)) & MASK) >> 11) / 2**53


def test_uniforms_are_uniform_and_independent_along_and_across_streams():
    table = uniforms(completion_seeds(0, 200)[:, None], torch.arange(200)).numpy()
    assert stats.kstest(table.ravel(), "uniform").pvalue > 0.01
    for one, other in ((table[:, :-1], table[:, 1:]), (table[:-1], table[1:])):
        cells = (one * 8).astype(int).ravel() * 8 + (other * 8).astype(int).ravel()
        counts = torch.bincount(torch.from_numpy(cells), minlength=64).numpy()
        assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.85},
        {"temperature": 0.9, "top_k": 4, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_distribution_and_carry_its_logprobs(params):
    tokens, logprobs = draws(40_000, **params)
    expected = slow_filter(LOGITS / params["temperature"], params.get("top_k", 0), params.get("top_p", 1.0)).softmax(0)
    torch.testing.assert_close(logprobs, expected.log()[tokens], atol=ROUNDING / min(1, params["temperature"]), rtol=0)
    possible = expected > 0
    counts = torch.bincount(tokens, minlength=len(LOGITS))
    assert not counts[~possible].any()
    shares = expected[possible].double()
    assert stats.chisquare(counts[possible], 40_000 * shares / shares.sum()).pvalue > 0.01


def test_draws_along_one_stream_follow_the_distribution():
    steps = 20_000
    stream = uniforms(completion_seeds(5, 1), torch.arange(steps))
    tokens, _ = sampling(steps, temperature=1.0).sample(LOGITS.expand(steps, -1), stream)
    possible = LOGITS.isfinite()
    counts = torch.bincount(tokens, minlength=len(LOGITS))[possible]
    assert stats.chisquare(counts, steps * LOGITS[possible].double().softmax(0)).pvalue > 0.01


def slow_filter(logits, top_k, top_p):
    """One row, by token: keep the k most likely, then the fewest whose mass reaches top_p."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))
    kept = order[:top_k] if top_k else order
    exps = {token: math.exp(logits[token].item() - logits[order[0]].item()) for token in kept}
    mass, nucleus = 0.0, []
    for token in kept:
        if mass / sum(exps.values()) >= top_p and nucleus:
            break
        nucleus.append(token)
        mass += exps[token]
    result = torch.full_like(logits, -math.inf)
    result[nucleus] = logits[nucleus]
    return result


# multiples of 1/4 without ties and a top_p off the grid of their masses, so that rounding cannot
# decide a filter
DISTINCT_LOGITS = st.lists(st.integers(-30, 30), min_size=2, max_size=12, unique=True)


@settings(deadline=None)
@given(DISTINCT_LOGITS, st.integers(0, 14), st.floats(0.05, 1.0), INT64)
def test_filters_agree_with_the_slow_ones(quarters, top_k, top_p, seed):
    logits = torch.tensor(quarters) / 4
    masses = logits.double().sort(descending=True).values.softmax(0).cumsum(0)
    if (masses - top_p).abs().min() < rounding(2 * len(logits)) and top_p < 1:
        return
    expected = slow_filter(logits, top_k, top_p).log_softmax(0)
    batch = sampling(1, len(logits), top_k=top_k, top_p=top_p)
    token, logprob = batch.sample(logits[None], numbers([seed]))
    assert expected[token].isfinite()
    # they span 15
    torch.testing.assert_close(logprob, expected[token], atol=rounding(2 * len(logits), 15), rtol=0)


def test_top_p_smaller_than_the_first_token_is_greedy_and_certain():
    tokens, logprobs = draws(50, top_p=0.01)
    assert tokens.tolist() == [3] * 50
    assert not logprobs.any()


def test_rows_of_a_batch_have_their_own_settings():
    params = [
        SamplingParams(),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.5, temperature=0.7),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=3.0),
    ]
    seeds = completion_seeds(9, 5).tolist()
    for step in range(20):
        logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(step))
        uniform = numbers(seeds, step)
        tokens, logprobs = BatchSampling.build(params, 30, CPU).sample(logits, uniform)
        for row in range(5):
            alone = BatchSampling.build(params[row : row + 1], 30, CPU)
            token, logprob = alone.sample(logits[row : row + 1], uniform[row : row + 1])
            assert token.item() == tokens[row].item()
            assert logprob.item() == pytest.approx(logprobs[row].item(), abs=rounding(30, 5))


def test_a_neighbour_with_top_p_drops_no_tokens_of_a_row_without_it():
    # the cumulative sum in float32 reaches 1 long before the tail ends; the tail must stay possible
    # all the same
    logits = torch.zeros(2, 200_000)
    logits[:, 0] = 18.0
    alone = BatchSampling.build([SamplingParams()], 200_000, CPU)
    beside = BatchSampling.build([SamplingParams(), SamplingParams(top_p=0.5)], 200_000, CPU)
    uniform = numbers([1, 2])
    _, expected = alone.sample(logits[:1], uniform[:1])
    _, actual = beside.sample(logits, uniform)
    # the tail has a share of 3e-3, which the first token would be given without it
    assert actual[0].item() == pytest.approx(expected[0].item(), abs=1e-4)


def test_greedy_takes_the_most_likely_token_with_its_logprob_at_temperature_one():
    tokens, logprobs = draws(20, temperature=0.0)
    assert tokens.tolist() == [3] * 20
    assert logprobs[0].item() == pytest.approx(LOGITS.log_softmax(0)[3].item(), abs=ROUNDING)


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(-30, 30, width=32)), min_size=2, max_size=30).filter(
        lambda row: any(value is not None for value in row)
    ),
    st.floats(0.0, 3.0).filter(lambda value: value == 0 or value > 0.05),
    st.integers(0, 40),
    st.floats(0.1, 1.0),
    INT64,
)
def test_banned_tokens_are_never_drawn(row, temperature, top_k, top_p, seed):
    logits = torch.tensor([-math.inf if value is None else value for value in row])
    batch = sampling(1, len(row), temperature=temperature, top_k=top_k, top_p=top_p)
    token, logprob = batch.sample(logits[None], numbers([seed], 3))
    assert logits[token].isfinite()
    assert -math.inf < logprob.item() <= rounding(30)


@pytest.mark.parametrize("value", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_a_possible_token(value):
    values = torch.full((50,), value, dtype=torch.float64)
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)) * 5
    logits[:, :3] = logits[:, -3:] = -math.inf
    tokens, _ = sampling(50, vocabulary=1000).sample(logits, values)
    assert logits.gather(1, tokens[:, None]).isfinite().all()


def test_a_large_vocabulary_is_drawn_from_evenly():
    values = torch.linspace(0.0001, 0.9999, 32, dtype=torch.float64)
    tokens, _ = sampling(32, vocabulary=150_000).sample(torch.zeros(32, 150_000), values)
    assert (tokens - 150_000 * values).abs().max() < 2


@pytest.mark.parametrize(("number", "token"), [(1 - 5e-10, 1), (1 - 2e-9, 0)])
def test_a_token_too_rare_for_a_float32_sum_can_be_drawn(number, token):
    # 1 + 1e-9 is 1 in float32: the second token's share of the sum would be empty
    uniform = torch.tensor([number], dtype=torch.float64)
    tokens, logprobs = sampling(1, vocabulary=2).sample(torch.tensor([[0.0, math.log(1e-9)]]), uniform)
    assert tokens.tolist() == [token]
    assert logprobs.item() == pytest.approx((0.0, math.log(1e-9))[token], abs=rounding(4, 21))


def test_filters_that_are_off_are_not_computed():
    assert sampling(3).top_k is None
    assert sampling(3).top_p is None
    mixed = BatchSampling.build([SamplingParams(), SamplingParams(top_k=5)], 100, CPU)
    assert mixed.top_k is not None
    assert mixed.top_k.tolist() == [[100], [5]]
