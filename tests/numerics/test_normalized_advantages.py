"""Advantages over a modality's running deviation: values by hand, invariances, long-run weight."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from learner.advantages import STD_DECAY, AdvantageEstimator, RunningRewardStd, group_advantages
from rlmed.core.config.schema import AlgoConfig
from rlmed.core.types import Example, Prompt, RolloutGroup, RolloutRequest, SamplingParams, ScoredGroup
from tests.configs import algo_config

ALGO = algo_config(advantage="dr_grpo", normalize_by="modality")


def scored(modality: str, rewards: Sequence[float], index: int = 0) -> ScoredGroup:
    example = Example("q", None, "?", ("a", "b"), 0, modality=modality)
    request = RolloutRequest(index, Prompt(example, "", np.array([1])), len(rewards), SamplingParams())
    return ScoredGroup(RolloutGroup(request, ()), np.array(rewards, dtype=np.float32), {})


def advantages(batch: Sequence[ScoredGroup], running: RunningRewardStd, algo: AlgoConfig = ALGO) -> list[np.ndarray]:
    """By an estimator that goes on from `running`, which then has what it has."""
    estimator = AdvantageEstimator(algo.advantage, algo.normalize_by)
    estimator.restore(running.moments)
    groups = estimator.estimate(batch)
    running.moments = estimator.state()
    return [group.advantages for group in groups]


def draw(rng: np.random.Generator, modality: str, scale: float, index: int) -> ScoredGroup:
    """Right or wrong, by a question's own difficulty, at the modality's scale."""
    correct = np.zeros(8)
    while not 0 < correct.sum() < 8:
        correct = (rng.random(8) < rng.uniform(0.1, 0.9)).astype(float)
    return scored(modality, (correct * scale).tolist(), index)


def test_a_group_that_lacks_a_reward_does_not_change_the_scale() -> None:
    running = RunningRewardStd()
    lacking = dataclasses.replace(scored("CT", [0.0, 8.0]), missing=("judge",))
    (first,) = advantages([lacking], running)
    assert running.moments == {}
    assert first.tolist() == [-4.0, 4.0]  # no deviation to divide by yet
    advantages([scored("CT", [0.0, 2.0]), lacking], running)
    assert running.of("CT") == math.sqrt(2)


def test_values_worked_by_hand() -> None:
    running = RunningRewardStd()
    # variances 2 (of 0, 2) and 0.5 (of 1, 2); the running one is then (0.99·2 + 0.5) / (0.99 + 1)
    running.add("CT", torch.tensor([0.0, 2.0]))
    assert running.of("CT") == pytest.approx(math.sqrt(2), abs=1e-12)
    running.add("CT", torch.tensor([1.0, 2.0]))
    assert running.of("CT") == pytest.approx(math.sqrt((0.99 * 2 + 0.5) / 1.99), abs=1e-12)
    assert running.of("MRI") == 0
    # 1.75 - mean 1 over 0.5 + eps; rloo: 1.75 - (0.25 + 1 + 1) / 3 = 1
    rewards = torch.tensor([1.75, 0.25, 1.0, 1.0])
    for estimator in ("grpo", "dr_grpo"):
        got = group_advantages(rewards, estimator, 0.25, running_std=0.5)
        torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 0.0, 0.0]))
    got = group_advantages(rewards, "rloo", 0.25, running_std=0.5)
    torch.testing.assert_close(got, torch.tensor([4 / 3, -4 / 3, 0.0, 0.0]))


def test_a_modality_of_one_group_has_the_advantages_of_grpo() -> None:
    rewards = [2.0, 0.0, 1.0, 2.0]
    (got,) = advantages([scored("CT", rewards)], RunningRewardStd())
    torch.testing.assert_close(torch.from_numpy(got), group_advantages(torch.tensor(rewards), "grpo"))


def test_the_running_standard_deviation_of_equal_groups_is_theirs_from_the_first_on() -> None:
    running = RunningRewardStd()
    for _ in range(500):
        running.add("CT", torch.tensor([0.0, 0.0, 1.0, 1.0]))
        assert running.of("CT") == pytest.approx(math.sqrt(1 / 3), rel=1e-12)


def test_it_follows_a_change_within_some_hundred_groups() -> None:
    running = RunningRewardStd()
    for reward in [10.0] * 300 + [1.0] * 300:
        running.add("CT", torch.tensor([0.0, reward]))
    # the old variance 50 has the weight 0.99^300 of a sum of about 100
    left = (1 - STD_DECAY**300) * STD_DECAY**300 * 50 + (1 - STD_DECAY**300) * 0.5
    assert running.of("CT") == pytest.approx(math.sqrt(left / (1 - STD_DECAY**600)), rel=1e-9)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_scale_and_shift_of_one_modality_change_nothing(estimator: str) -> None:
    algo = dataclasses.replace(ALGO, advantage=estimator)
    rng = np.random.default_rng(0)
    runnings = RunningRewardStd(), RunningRewardStd()
    for step in range(20):
        plain = [draw(rng, ("MRI", "CT")[i % 2], 1.0, 8 * step + i) for i in range(8)]
        other = [
            dataclasses.replace(group, rewards=group.rewards * 4 - 8) if i % 2 else group
            for i, group in enumerate(plain)
        ]
        for one, two in zip(
            *(advantages(b, s, algo) for b, s in zip((plain, other), runnings, strict=True)), strict=True
        ):
            np.testing.assert_allclose(one, two, atol=2e-3)  # std_eps is the one thing with a scale


def test_in_the_long_run_each_modality_weighs_the_same() -> None:
    """Mean squares of advantages at scales 0.1, 1 and 10 (seldom drawn); unscaled, 10⁴ apart."""
    scales, rng, running = {"MRI": 0.1, "CT": 1.0, "X-ray": 10.0}, np.random.default_rng(1), RunningRewardStd()
    squares: dict[str, dict[str, list[float]]] = {"normalized": defaultdict(list), "plain": defaultdict(list)}
    for step in range(400):
        names = rng.choice(list(scales), 8, p=[0.5, 0.4, 0.1])
        batch = [draw(rng, name, scales[name], 8 * step + i) for i, name in enumerate(names)]
        plain = dataclasses.replace(ALGO, normalize_by=None)
        for side, algo in (("normalized", ALGO), ("plain", plain)):
            for name, values in zip(names, advantages(batch, running, algo), strict=True):
                squares[side][name].append(float((values**2).mean()))
    normalized, plain_ = ({name: np.mean(values) for name, values in squares[side].items()} for side in squares)
    assert all(value == pytest.approx(7 / 8, rel=0.05) for value in normalized.values())
    assert plain_["X-ray"] > 5000 * plain_["MRI"]


def test_within_a_modality_a_question_keeps_its_weight() -> None:
    """Unlike with each group's own std: even odds weigh more than one right in eight."""
    even, rare = scored("CT", [0, 0, 0, 0, 1, 1, 1, 1], 0), scored("CT", [0] * 7 + [1], 1)
    weights = [float((values**2).mean()) for values in advantages([even, rare], RunningRewardStd())]
    # r·(1 - r) is 16/64 and 7/64
    assert weights[0] / weights[1] == pytest.approx(16 / 7, rel=1e-5)


def test_groups_without_running_get_exactly_zero_and_do_not_count() -> None:
    running = RunningRewardStd()
    flat = scored("CT", [0.7] * 8, 0)
    assert not advantages([flat], running)[0].any()
    assert running.moments == {}
    with_, without = RunningRewardStd(), RunningRewardStd()
    taught = scored("CT", [0, 1, 1, 0], 1)
    got = advantages([flat, taught], with_), advantages([taught], without)
    assert with_ == without
    np.testing.assert_array_equal(got[0][1], got[1][0])
    assert not got[0][0].any()


def test_the_order_in_which_groups_finished_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    batch = [draw(rng, "CT", 1 + i, i) for i in range(6)]
    one, other = RunningRewardStd(), RunningRewardStd()
    forward, backward = advantages(batch, one), advantages(batch[::-1], other)
    assert one == other
    for values, same in zip(forward, backward[::-1], strict=True):
        np.testing.assert_array_equal(values, same)


def test_a_resumed_running_goes_on() -> None:
    rng = np.random.default_rng(3)
    estimator, restored = (AdvantageEstimator("dr_grpo", "modality") for _ in range(2))
    estimator.estimate([draw(rng, "CT", 1.0, 0), draw(rng, "", 2.0, 1)])
    restored.restore(json.loads(json.dumps(estimator.state())))
    assert restored.metrics() == estimator.metrics() != {}
    batch = [draw(rng, "CT", 3.0, 2), draw(rng, "", 2.0, 3)]
    for one, other in zip(
        *([group.advantages for group in each.estimate(batch)] for each in (estimator, restored)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
