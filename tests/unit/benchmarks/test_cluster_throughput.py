"""The loop on a simulated clock keeps the pace that its law says; real time plays no part."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.cluster_throughput import law_s, simulate, table
from benchmarks.simulation import Clock, Costs, Load

ROLLOUT_BOUND = Costs(prompt_s=0.01, step_s=0.004, row_s=0.001, learn_s=0.1, push_s=0.02)
LEARNER_BOUND = dataclasses.replace(ROLLOUT_BOUND, learn_s=2.0)
LINEAR = Costs(prompt_s=0.0, step_s=0.0, row_s=0.001, learn_s=0.0, push_s=0.0)
FOUR = Load(groups=4, group_size=4, max_tokens=16)


@pytest.mark.parametrize("costs", [ROLLOUT_BOUND, LEARNER_BOUND])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_on_policy_a_step_is_its_rollout_and_its_learning(costs: Costs, workers: int) -> None:
    found = simulate(costs, FOUR, workers=workers, max_staleness=0, steps=3)
    groups = 4 // workers
    rollout = groups * 0.01 + 16 * (0.004 + groups * 4 * 0.001)
    assert found["step_s"] == pytest.approx(rollout + costs.learn_s + 0.02, rel=1e-9)
    assert found["efficiency"] == pytest.approx(1.0, rel=1e-9)
    assert found["busy_share"] == pytest.approx(rollout / found["step_s"], rel=1e-9)
    assert found["tokens_per_s"] == pytest.approx(4 * 4 * 16 / found["step_s"], rel=1e-9)


def test_with_staleness_the_slower_half_sets_the_pace() -> None:
    found = simulate(ROLLOUT_BOUND, FOUR, workers=1, max_staleness=1, steps=5)
    assert found["step_s"] == pytest.approx(4 * 0.01 + 16 * (0.004 + 16 * 0.001), rel=1e-9)
    assert found["busy_share"] == pytest.approx(1.0, rel=1e-9)
    for workers in (1, 2, 4):
        found = simulate(LEARNER_BOUND, FOUR, workers=workers, max_staleness=1, steps=5)
        assert found["step_s"] == pytest.approx(2.02, rel=1e-9)


def test_without_a_fixed_cost_two_workers_take_half_the_time() -> None:
    one, two = (simulate(LINEAR, FOUR, workers=count, max_staleness=0, steps=3)["step_s"] for count in (1, 2))
    assert one / two == pytest.approx(2.0, rel=1e-9)


def test_uneven_groups_and_lengths_cost_efficiency() -> None:
    uneven = simulate(ROLLOUT_BOUND, dataclasses.replace(FOUR, groups=5), workers=4, max_staleness=0, steps=3)
    assert uneven["efficiency"] < 0.95
    # a step ends with the worker whose completions are the longest
    lengths = dataclasses.replace(FOUR, shortest=0.25)
    assert simulate(LINEAR, lengths, workers=4, max_staleness=0, steps=20)["efficiency"] < 0.95


def test_the_same_simulation_gives_the_same_numbers() -> None:
    load = dataclasses.replace(FOUR, shortest=0.25)
    first, second = (simulate(ROLLOUT_BOUND, load, workers=2, max_staleness=1, steps=4) for _ in range(2))
    assert first == second


def test_the_law() -> None:
    costs = Costs(prompt_s=1.0, step_s=0.5, row_s=0.25, learn_s=3.0, push_s=1.0)
    load = Load(groups=4, group_size=2, max_tokens=10, shortest=0.2)
    # per worker: 2 prompts, 10 steps, 2 groups x 2 completions x 6 tokens on average
    rollout = 2 * 1.0 + 10 * 0.5 + 2 * 2 * 6 * 0.25
    assert law_s(costs, load, 2, 0) == pytest.approx(rollout + 4.0)
    assert law_s(costs, load, 2, 1) == pytest.approx(rollout)
    assert law_s(dataclasses.replace(costs, learn_s=30.0), load, 2, 1) == pytest.approx(31.0)


def test_the_lead_is_on_one_worker_of_the_same_setting() -> None:
    cases = [simulate(ROLLOUT_BOUND, FOUR, workers=count, max_staleness=0, steps=2) for count in (1, 4)]
    one, four = (line.split()[-1] for line in table(cases)[1:])
    assert (one, float(four)) == ("1.00", round(cases[0]["step_s"] / cases[1]["step_s"], 2))


def test_a_loop_that_waits_for_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no worker will do"):
        Clock().next_event()
