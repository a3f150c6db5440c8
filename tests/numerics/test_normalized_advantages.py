"""Advantages divided by the running spread of a modality: values worked by hand, invariances, equal weight in the long run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from learner.advantages import SPREAD_DECAY, RunningSpread, group_advantages
from rlmed.controller import LoopState, to_train_groups
from rlmed.core.config import AlgoConfig
from rlmed.core.types import Example, Prompt, RolloutGroup, RolloutRequest, SamplingParams, ScoredGroup
from tests.configs import algo_config

ALGO = algo_config(advantage="dr_grpo", normalize_by="modality")


def scored(modality: str, rewards: Sequence[float], index: int = 0) -> ScoredGroup:
    example = Example("q", None, "?", ("a", "b"), 0, modality=modality)
    request = RolloutRequest(index, Prompt(example, "", np.array([1])), len(rewards), SamplingParams())
    return ScoredGroup(RolloutGroup(request, ()), np.array(rewards, dtype=np.float32), {})


def advantages(batch: Sequence[ScoredGroup], spread: RunningSpread, algo: AlgoConfig = ALGO) -> list[np.ndarray]:
    return [group.advantages for group in to_train_groups(batch, algo, spread)]


def draw(rng: np.random.Generator, modality: str, scale: float, index: int) -> ScoredGroup:
    """Right or wrong, by a question's own difficulty, at the modality's scale."""
    right = np.zeros(8)
    while not 0 < right.sum() < 8:
        right = (rng.random(8) < rng.uniform(0.1, 0.9)).astype(float)
    return scored(modality, (right * scale).tolist(), index)


def test_values_worked_by_hand() -> None:
    spread = RunningSpread()
    # variances 2 (of 0, 2) and 0.5 (of 1, 2); the running one is then (0.99·2 + 0.5) / (0.99 + 1)
    spread.add("CT", torch.tensor([0.0, 2.0]))
    assert spread.of("CT") == pytest.approx(math.sqrt(2), abs=1e-12)
    spread.add("CT", torch.tensor([1.0, 2.0]))
    assert spread.of("CT") == pytest.approx(math.sqrt((0.99 * 2 + 0.5) / 1.99), abs=1e-12)
    assert spread.of("MRI") == 0
    # 1.75 - mean 1 over 0.5 + eps; rloo: 1.75 - (0.25 + 1 + 1) / 3 = 1
    rewards = torch.tensor([1.75, 0.25, 1.0, 1.0])
    for kind in ("grpo", "dr_grpo"):
        got = group_advantages(rewards, kind, 0.25, spread=0.5)
        torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 0.0, 0.0]))
    got = group_advantages(rewards, "rloo", 0.25, spread=0.5)
    torch.testing.assert_close(got, torch.tensor([4 / 3, -4 / 3, 0.0, 0.0]))


def test_a_modality_of_one_group_has_the_advantages_of_grpo() -> None:
    rewards = [2.0, 0.0, 1.0, 2.0]
    (got,) = advantages([scored("CT", rewards)], RunningSpread())
    torch.testing.assert_close(torch.from_numpy(got), group_advantages(torch.tensor(rewards), "grpo"))


def test_a_running_spread_of_equal_groups_is_theirs_from_the_first_on() -> None:
    spread = RunningSpread()
    for _ in range(500):
        spread.add("CT", torch.tensor([0.0, 0.0, 1.0, 1.0]))
        assert spread.of("CT") == pytest.approx(math.sqrt(1 / 3), rel=1e-12)


def test_it_follows_a_change_within_some_hundred_groups() -> None:
    spread = RunningSpread()
    for reward in [10.0] * 300 + [1.0] * 300:
        spread.add("CT", torch.tensor([0.0, reward]))
    # the old variance 50 has the weight 0.99^300 of a sum of about 100
    left = (1 - SPREAD_DECAY**300) * SPREAD_DECAY**300 * 50 + (1 - SPREAD_DECAY**300) * 0.5
    assert spread.of("CT") == pytest.approx(math.sqrt(left / (1 - SPREAD_DECAY**600)), rel=1e-9)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_scale_and_shift_of_one_modality_change_nothing(kind: str) -> None:
    algo = dataclasses.replace(ALGO, advantage=kind)
    rng = np.random.default_rng(0)
    spreads = RunningSpread(), RunningSpread()
    for step in range(20):
        plain = [draw(rng, ("MRI", "CT")[i % 2], 1.0, 8 * step + i) for i in range(8)]
        other = [
            dataclasses.replace(group, rewards=group.rewards * 4 - 8) if i % 2 else group
            for i, group in enumerate(plain)
        ]
        for one, two in zip(
            *(advantages(b, s, algo) for b, s in zip((plain, other), spreads, strict=True)), strict=True
        ):
            np.testing.assert_allclose(one, two, atol=2e-3)  # std_eps is the one thing with a scale


def test_in_the_long_run_each_modality_weighs_the_same() -> None:
    """Mean squares of advantages at scales 0.1, 1 and 10, of which the last is seldom drawn; unscaled they are 10⁴ apart."""
    scales, rng, spread = {"MRI": 0.1, "CT": 1.0, "X-ray": 10.0}, np.random.default_rng(1), RunningSpread()
    squares: dict[str, dict[str, list[float]]] = {"normalized": defaultdict(list), "plain": defaultdict(list)}
    for step in range(400):
        names = rng.choice(list(scales), 8, p=[0.5, 0.4, 0.1])
        batch = [draw(rng, name, scales[name], 8 * step + i) for i, name in enumerate(names)]
        plain = dataclasses.replace(ALGO, normalize_by=None)
        for side, algo in (("normalized", ALGO), ("plain", plain)):
            for name, values in zip(names, advantages(batch, spread, algo), strict=True):
                squares[side][name].append(float((values**2).mean()))
    normalized, plain_ = ({name: np.mean(values) for name, values in squares[side].items()} for side in squares)
    assert all(value == pytest.approx(7 / 8, rel=0.05) for value in normalized.values())
    assert plain_["X-ray"] > 5000 * plain_["MRI"]


def test_within_a_modality_a_question_keeps_its_weight() -> None:
    """Unlike with each group's own std: even odds weigh more than one right in eight."""
    even, rare = scored("CT", [0, 0, 0, 0, 1, 1, 1, 1], 0), scored("CT", [0] * 7 + [1], 1)
    weights = [float((values**2).mean()) for values in advantages([even, rare], RunningSpread())]
    # r·(1 - r) is 16/64 and 7/64
    assert weights[0] / weights[1] == pytest.approx(16 / 7, rel=1e-5)


def test_groups_without_spread_get_exactly_zero_and_do_not_count() -> None:
    spread = RunningSpread()
    flat = scored("CT", [0.7] * 8, 0)
    assert not advantages([flat], spread)[0].any()
    assert spread.moments == {}
    with_, without = RunningSpread(), RunningSpread()
    taught = scored("CT", [0, 1, 1, 0], 1)
    got = advantages([flat, taught], with_), advantages([taught], without)
    assert with_ == without
    np.testing.assert_array_equal(got[0][1], got[1][0])
    assert not got[0][0].any()


def test_the_order_in_which_groups_finished_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    batch = [draw(rng, "CT", 1 + i, i) for i in range(6)]
    one, other = RunningSpread(), RunningSpread()
    forward, backward = advantages(batch, one), advantages(batch[::-1], other)
    assert one == other
    for values, same in zip(forward, backward[::-1], strict=True):
        np.testing.assert_array_equal(values, same)


def test_a_resumed_spread_goes_on() -> None:
    rng = np.random.default_rng(3)
    state = LoopState(step=5, cursor=40, pending=[38, 39])
    advantages([draw(rng, "CT", 1.0, 0), draw(rng, "", 2.0, 1)], state.spread)
    restored = LoopState.restore(json.loads(json.dumps(dataclasses.asdict(state))))
    assert restored == state
    batch = [draw(rng, "CT", 3.0, 2), draw(rng, "", 2.0, 3)]
    for one, other in zip(advantages(batch, state.spread), advantages(batch, restored.spread), strict=True):
        np.testing.assert_array_equal(one, other)
