"""The policy loss: values worked by hand, a slow reference in plain Python, invariances."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from learner.losses import LossDenominators, count_denominators, policy_loss
from learner.metrics import merge_metrics
from tests.configs import loss_config
from tests.rounding import rounding

SETTINGS = [
    pytest.param(level, clip, aggregation, id=f"{level}-{clip}-{aggregation}")
    for level, clip, aggregation in itertools.product(
        ("token", "sequence"), ("ppo", "dual", "cispo", "none"), ("sequence_mean", "token_mean", "sequence_sum")
    )
]
PENALTIES = ((0.0, "none"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3"))
CAPS = (None, 1.1)
MAX_TOKENS = 11
DIGITS = 1e-6
"""Values worked by hand have six digits."""
ROUNDING = rounding(400, 3, torch.float64)
"""Up to 41 tokens of about ten operations each, on values of about 3."""


# --- values worked by hand
# ------------------------------------------------------------------------------------------
# Completion 0, A = 2: ratios 1.5, 0.5. Completion 1, A = -1: ratios 1.5, 0.5, 1. Every old
# probability is 0.5. The token in the middle (probability 0.9) is masked.
PROBABILITIES = torch.tensor([0.75, 0.25, 0.9, 0.75, 0.25, 0.5], dtype=torch.float64)
HALF = torch.full((6,), 0.5, dtype=torch.float64).log()
HAND = {
    "old_logprobs": HALF,
    "rollout_logprobs": HALF,
    "ref_logprobs": HALF,
    "advantages": torch.tensor([2.0, -1.0], dtype=torch.float64),
    "sequence_ids": torch.tensor([0, 0, 0, 1, 1, 1]),
    "loss_mask": torch.tensor([True, True, False, True, True, True]),
    "denominators": LossDenominators(5.0, 2.0, 10),
}
LN_75, LN_25, LN_50 = math.log(0.75), math.log(0.25), math.log(0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # ppo: A=2: min(3, 2.4) = 2.4, min(1, 1.6) = 1; A=-1: min(-1.5, -1.2) = -1.5, min(-0.5,
        # -0.8) = -0.8, -1 -( (2.4 + 1)/2 + (-1.5 - 0.8 - 1)/3 ) / 2 = -(1.7 - 1.1)/2
        ({}, -0.3),
        # -(3.4 - 3.3)/5 and -(3.4 - 3.3)/(2*10)
        ({"aggregation": "token_mean"}, -0.02),
        ({"aggregation": "sequence_sum"}, -0.005),
        # clip-higher 0.28: A=2: min(3, 2.56) = 2.56: -( (2.56 + 1)/2 - 1.1 )/2 = -(1.78 - 1.1)/2
        ({"clip_ratio_high": 0.28}, -0.34),
        # none: -( (3 + 1)/2 + (-1.5 - 0.5 - 1)/3 ) / 2 = -(2 - 1)/2
        ({"clip": "none"}, -0.5),
        # dual at 1.4: the -1.5 becomes -1.4: -(1.7 - 3.2/3)/2
        ({"clip": "dual", "dual_clip": 1.4}, -(1.7 - 3.2 / 3) / 2),
        # cispo: weights 1.2, 0.8 and 1.2, 0.8, 1 times A * log p
        (
            {"clip": "cispo"},
            -(2 * (1.2 * LN_75 + 0.8 * LN_25) / 2 - (1.2 * LN_75 + 0.8 * LN_25 + 1.0 * LN_50) / 3) / 2,
        ),
        # sequence: s0 = sqrt(1.5*0.5) = 0.866025, s1 = (1.5*0.5*1)**(1/3) = 0.908560, both within
        # the clip -(2*0.866025 - 0.908560)/2 = -0.411745
        ({"ratio_level": "sequence"}, -0.411745),
        # sequence, clip 0.1: A=2: min(0.866, 0.9) unchanged; A=-1: min(-0.908560, -0.908560)
        # unchanged; clip 0.05: A=-1: min(-0.908560, -0.95) = -0.95: -(1.732051 - 0.95)/2 =
        # -0.391025
        ({"ratio_level": "sequence", "clip_ratio_low": 0.05}, -0.391025),
        # k3 against 0.5: p=0.75: 0.072132, p=0.25: 0.306853, p=0.5: 0
        # -0.3 + 0.1 * (0.378985/2 + 0.378985/3)/2 = -0.3 + 0.1 * 0.157910
        ({"kl_coef": 0.1}, -0.284209),
        # k2: ln(1.5)**2/2 = 0.082201, ln(0.5)**2/2 = 0.240227: -0.3 + 0.1 * (0.322428/2 +
        # 0.322428/3)/2
        ({"kl_coef": 0.1, "kl_estimator": "k2"}, -0.286566),
        # k1: ln 1.5 - ln 2 = -0.287682: -0.3 + 0.1 * (-0.287682/2 - 0.287682/3)/2
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, -0.311987),
    ],
)
def test_values_worked_by_hand(settings, expected):
    config = loss_config(**{"kl_coef": 0.0, **settings})
    loss, _ = policy_loss(PROBABILITIES.log(), **HAND, config=config)
    assert loss.item() == pytest.approx(expected, abs=DIGITS)


def test_importance_weights_worked_by_hand():
    # old/rollout = 0.5/0.25 = 2, capped to 1.5, and 0.5/0.625 = 0.8, for the tokens of completion
    # 0; 1 for the others -( (1.5*2.4 + 0.8*1)/2 - 1.1 )/2 = -(2.2 - 1.1)/2; the penalty is not
    # weighted: + 0.0157910 as above
    rollout = torch.tensor([0.25, 0.625, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64).log()
    config = loss_config(kl_coef=0.1, importance_cap=1.5)
    loss, metrics = policy_loss(PROBABILITIES.log(), **{**HAND, "rollout_logprobs": rollout}, config=config)
    assert loss.item() == pytest.approx(-0.55 + 0.0157910, abs=DIGITS)
    # mismatch: 2 - 1 - ln 2 = 0.306853 and 0.8 - 1 - ln 0.8 = 0.023144, over 5 tokens
    assert metrics["mismatch_kl"].value() == pytest.approx((0.306853 + 0.023144) / 5, abs=DIGITS)


def test_metrics_worked_by_hand():
    config = loss_config(clip="dual", dual_clip=1.4, kl_coef=0.0)
    _, metrics = policy_loss(PROBABILITIES.log().requires_grad_(), **HAND, config=config)
    values = {name: metric.value() for name, metric in metrics.items()}
    # ratios 1.5 0.5 | 1.5 0.5 1: mean 5/5. Above 1.2 with A > 0: one; below 0.8 with A < 0: one;
    # above 1.4 with A < 0: one. kl: 2 * (0.072132 + 0.306853) / 5 = 0.151594
    assert values == pytest.approx(
        {
            "ratio": 1.0,
            "ratio_max": 1.5,
            "clip_fraction_low": 0.2,
            "clip_fraction_high": 0.2,
            "clip_fraction_dual": 0.2,
            "mismatch_kl": 0.0,
            "kl": 0.151594,
        },
        abs=DIGITS,
    )
    # cispo changes the weights 1.5 -> 1.2 and 0.5 -> 0.8 of both completions: two and two of five;
    # none clips nothing
    for clip, fraction in (("cispo", 0.4), ("none", 0.0)):
        _, metrics = policy_loss(PROBABILITIES.log(), **HAND, config=replace(config, clip=clip))
        assert metrics["clip_fraction_low"].value() == pytest.approx(fraction)
        assert metrics["clip_fraction_high"].value() == pytest.approx(fraction)


def test_gradients_worked_by_hand():
    def gradient(**settings):
        logprobs = PROBABILITIES.log().requires_grad_()
        policy_loss(logprobs, **HAND, config=loss_config(kl_coef=0.0, **settings))[0].backward()
        return logprobs.grad.tolist()

    # d ratio / d logprob = ratio. Tokens 0 (r > 1.2, A > 0) and 4 (r < 0.8, A < 0) are clipped: 0.
    # The others: -A * r / (2 * |o|): -2*0.5/4, masked 0, 1.5/6, 1/6
    assert gradient() == pytest.approx([0, -0.25, 0, 0.25, 0, 1 / 6])
    # cispo lets every token learn: -A * clip(r) / (2 * |o|): -2.4/4, -1.6/4, 0, 1.2/6, 0.8/6, 1/6
    assert gradient(clip="cispo") == pytest.approx([-0.6, -0.4, 0, 0.2, 0.8 / 6, 1 / 6])
    # sequence: every token of a completion gets the same -A * s / |o| / 2: -2*0.866025/4,
    # 0.908560/6
    s0, s1 = -(0.75**0.5) / 2, 0.75 ** (1 / 3) / 6
    assert gradient(ratio_level="sequence") == pytest.approx([s0, s0, 0, s1, s1, s1])


def test_loss_as_released_with_medvlm_r1():
    """exp(logp - logp.detach()) * A - beta * k3, mean of a completion, then of the batch.

    Clipping changes nothing.
    """
    logprobs = PROBABILITIES.log()
    released = logprobs.clone().requires_grad_()
    d = HALF - released
    advantages = HAND["advantages"][HAND["sequence_ids"]]
    per_token = (released - released.detach()).exp() * advantages - 0.04 * (d.exp() - d - 1)
    (-(per_token[:2].mean() + per_token[3:].mean()) / 2).backward()
    for clip in ("none", "ppo"):
        ours = logprobs.clone().requires_grad_()
        inputs = {**HAND, "old_logprobs": logprobs}
        loss, _ = policy_loss(ours, **inputs, config=loss_config(clip=clip))
        loss.backward()
        # every ratio is 1, so the first term is -(2 - 1)/2; the penalty is 0.04 * 0.157910
        assert loss.item() == pytest.approx(-0.5 + 0.04 * 0.157910, abs=DIGITS)
        torch.testing.assert_close(ours.grad, released.grad, atol=ROUNDING, rtol=0)


# --- a slow reference
# -----------------------------------------------------------------------------------------------
def random_batch(seed=0, lengths=(5, 1, 7, 3, 4)):
    """Completions of these lengths as flat float64; about a fifth is masked, never the first."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def noise(scale):
        return scale * torch.randn(total, generator=generator, dtype=torch.float64)

    logprobs = -0.1 - 3 * torch.rand(total, generator=generator, dtype=torch.float64)
    loss_mask = torch.rand(total, generator=generator) > 0.2
    loss_mask[torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])] = True
    # an offset per completion, so that ratios of whole completions reach the clips too
    offsets = 0.5 * torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    old = logprobs + noise(0.3) + offsets.repeat_interleave(torch.tensor(lengths))
    return {
        "logprobs": logprobs,
        "old_logprobs": old,
        "rollout_logprobs": old + noise(0.2),
        "ref_logprobs": logprobs + noise(0.5),
        "advantages": torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        "sequence_ids": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        "loss_mask": loss_mask,
    }


def denominators_of(batch):
    counts = [int(batch["loss_mask"][batch["sequence_ids"] == i].sum()) for i in range(len(batch["advantages"]))]
    return count_denominators(counts, MAX_TOKENS)


def slow_loss(batch, logprobs, config):
    """The formulas, one token at a time, in Python floats.

    `logprobs` replaces those of the batch where a gradient flows; those of the batch stand where
    the formula stops it.
    """
    old, rollout, ref = (batch[k].tolist() for k in ("old_logprobs", "rollout_logprobs", "ref_logprobs"))
    ids, stopped, advantages = (batch[k].tolist() for k in ("sequence_ids", "logprobs", "advantages"))
    trained = [n for n, keep in enumerate(batch["loss_mask"].tolist()) if keep]
    members = {i: [n for n in trained if ids[n] == i] for i in set(ids)}

    def ratio(n, values):
        if config.ratio_level == "token":
            return math.exp(values[n] - old[n])
        tokens = members[ids[n]]
        return math.exp(sum(values[k] - old[k] for k in tokens) / len(tokens))

    total = 0.0
    for n in trained:
        advantage, low, high = advantages[ids[n]], 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
        r = ratio(n, logprobs)
        if config.clip == "none":
            gain = r * advantage
        elif config.clip == "cispo":
            gain = min(max(ratio(n, stopped), low), high) * advantage * logprobs[n]
        else:
            gain = min(r * advantage, min(max(r, low), high) * advantage)
            if config.clip == "dual" and advantage < 0:
                gain = max(gain, config.dual_clip * advantage)
        if config.importance_cap is not None:
            gain *= min(math.exp(old[n] - rollout[n]), config.importance_cap)
        d = ref[n] - logprobs[n]
        kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1, "none": 0.0}[config.kl_estimator]
        divisor = {
            "sequence_mean": len(members) * len(members[ids[n]]),
            "token_mean": len(trained),
            "sequence_sum": len(members) * MAX_TOKENS,
        }[config.aggregation]
        total += (-gain + config.kl_coef * kl) / divisor
    return total


DIFFERENCE = 1e-5


def slow_gradient(batch, config, step=DIFFERENCE):
    """Central differences of the slow loss: off by rounding over the step and the step's square."""
    point = batch["logprobs"].tolist()
    gradient = []
    for n in range(len(point)):
        up, down = ([*point[:n], point[n] + sign * step, *point[n + 1 :]] for sign in (1, -1))
        gradient.append((slow_loss(batch, up, config) - slow_loss(batch, down, config)) / (2 * step))
    return torch.tensor(gradient, dtype=torch.float64)


def loss_and_gradient(batch, denominators, config):
    logprobs = batch["logprobs"].clone().requires_grad_()
    loss, metrics = policy_loss(**{**batch, "logprobs": logprobs}, denominators=denominators, config=config)
    loss.backward()
    return loss.detach(), logprobs.grad, metrics


REFERENCE_LENGTHS = (5, 1, 7, 3, 4, 6, 8, 2, 5)
REFERENCE_CLIPS = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.25, "dual_clip": 1.5}


@pytest.mark.parametrize(("level", "clip", "aggregation"), SETTINGS)
def test_value_and_gradient_equal_the_slow_reference(level, clip, aggregation):
    batch = random_batch(lengths=REFERENCE_LENGTHS)
    for (kl_coef, estimator), cap in itertools.product(PENALTIES, CAPS):
        config = loss_config(
            ratio_level=level,
            clip=clip,
            **REFERENCE_CLIPS,
            kl_coef=kl_coef,
            kl_estimator=estimator,
            aggregation=aggregation,
            importance_cap=cap,
        )
        loss, gradient, _ = loss_and_gradient(batch, denominators_of(batch), config)
        assert loss.item() == pytest.approx(slow_loss(batch, batch["logprobs"].tolist(), config), abs=ROUNDING)
        torch.testing.assert_close(gradient, slow_gradient(batch, config), atol=ROUNDING / DIFFERENCE, rtol=0)


def test_the_random_batch_exercises_every_clip():
    """Otherwise the comparison above would pass without any clip."""
    batch = random_batch(lengths=REFERENCE_LENGTHS)
    for level in ("token", "sequence"):
        config = loss_config(ratio_level=level, clip="dual", **REFERENCE_CLIPS)
        _, _, metrics = loss_and_gradient(batch, denominators_of(batch), config)
        for name in ("clip_fraction_low", "clip_fraction_high", "clip_fraction_dual"):
            assert 0 < metrics[name].value() < 1
    weights = (batch["old_logprobs"] - batch["rollout_logprobs"]).exp()
    assert 0 < (weights > CAPS[1]).sum() < len(weights)


# --- invariances
# ----------------------------------------------------------------------------------------------------
def select(batch, completions):
    """The micro-batch with these completions, renumbered in this order."""
    tokens = torch.cat([torch.nonzero(batch["sequence_ids"] == i).flatten() for i in completions])
    renumbered = torch.empty(len(batch["advantages"]), dtype=torch.int64)
    renumbered[torch.tensor(completions)] = torch.arange(len(completions))
    part = {name: values[tokens] for name, values in batch.items() if name not in ("advantages", "sequence_ids")}
    part["advantages"] = batch["advantages"][torch.tensor(completions)]
    part["sequence_ids"] = renumbered[batch["sequence_ids"][tokens]]
    return tokens, part


@pytest.mark.parametrize(("level", "clip", "aggregation"), SETTINGS)
@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4]], [[0, 1, 2, 3], [4]], [[4, 1], [3, 0, 2]]])
def test_splitting_a_step_changes_neither_loss_nor_gradient_nor_metrics(level, clip, aggregation, split):
    batch = random_batch(seed=3)
    config = loss_config(ratio_level=level, clip=clip, aggregation=aggregation, importance_cap=1.1)
    denominators = denominators_of(batch)
    whole_loss, whole_gradient, whole_metrics = loss_and_gradient(batch, denominators, config)
    loss, gradient, metrics = torch.zeros_like(whole_loss), torch.zeros_like(whole_gradient), []
    for completions in split:
        tokens, part = select(batch, completions)
        part_loss, gradient[tokens], part_metrics = loss_and_gradient(part, denominators, config)
        loss += part_loss
        metrics.append(part_metrics)
    torch.testing.assert_close(loss, whole_loss, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(gradient, whole_gradient, atol=ROUNDING, rtol=0)
    merged = {name: metric.value() for name, metric in merge_metrics(metrics).items()}
    assert merged == pytest.approx({name: metric.value() for name, metric in whole_metrics.items()})


@pytest.mark.parametrize(("level", "clip", "aggregation"), SETTINGS)
def test_the_order_of_tokens_changes_nothing(level, clip, aggregation):
    batch = random_batch(seed=4)
    order = torch.randperm(len(batch["logprobs"]), generator=torch.Generator().manual_seed(0))
    shuffled = {name: values if name == "advantages" else values[order] for name, values in batch.items()}
    config = loss_config(ratio_level=level, clip=clip, aggregation=aggregation, importance_cap=1.1)
    loss, gradient, _ = loss_and_gradient(batch, denominators_of(batch), config)
    shuffled_loss, shuffled_gradient, _ = loss_and_gradient(shuffled, denominators_of(batch), config)
    torch.testing.assert_close(shuffled_loss, loss, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(shuffled_gradient, gradient[order], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("poison", [0.0, 50.0, -math.inf, math.nan])
@pytest.mark.parametrize(("level", "clip", "aggregation"), SETTINGS)
def test_masked_tokens_have_no_influence_whatever_they_hold(level, clip, aggregation, poison):
    batch = random_batch(seed=5)
    config = loss_config(ratio_level=level, clip=clip, aggregation=aggregation, importance_cap=1.1)
    clean = loss_and_gradient(batch, denominators_of(batch), config)
    assert not batch["loss_mask"].all()
    poisoned = dict(batch)
    for name in ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs"):
        poisoned[name] = torch.where(batch["loss_mask"], batch[name], poison)
    spoiled = loss_and_gradient(poisoned, denominators_of(batch), config)
    assert torch.equal(spoiled[0], clean[0])
    assert torch.equal(spoiled[1], clean[1])
    assert not spoiled[1][~batch["loss_mask"]].any()
    assert {n: m.value() for n, m in spoiled[2].items()} == {n: m.value() for n, m in clean[2].items()}


def test_a_completion_or_micro_batch_without_trained_tokens_is_harmless():
    batch = random_batch(seed=6)
    config = loss_config(ratio_level="sequence")
    _, _, metrics = loss_and_gradient(batch, denominators_of(batch), config)
    filled = {**batch, "loss_mask": batch["loss_mask"] & (batch["sequence_ids"] != 2)}
    without = select(batch, [0, 1, 3, 4])
    filled_loss, filled_gradient, _ = loss_and_gradient(filled, denominators_of(filled), config)
    expected, expected_gradient, _ = loss_and_gradient(without[1], denominators_of(without[1]), config)
    torch.testing.assert_close(filled_loss, expected, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(filled_gradient[without[0]], expected_gradient, atol=ROUNDING, rtol=0)

    nothing = {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])}
    empty_loss, empty_gradient, empty_metrics = loss_and_gradient(nothing, LossDenominators(0.0, 0.0, 8), config)
    assert empty_loss.item() == 0.0
    assert not empty_gradient.any()
    merged = merge_metrics([metrics, empty_metrics])
    assert {n: m.value() for n, m in merged.items()} == {n: m.value() for n, m in metrics.items()}


# --- numbers that are not finite
# ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_an_input_that_is_not_finite_makes_the_loss_nan(name, value):
    """-inf would otherwise vanish in exp() or in a clamp, and the step would look healthy."""
    for clip in ("ppo", "dual", "cispo", "none"):
        batch = random_batch(seed=7)
        batch[name] = batch[name].clone()
        batch[name][0] = value
        loss, _, _ = loss_and_gradient(batch, denominators_of(random_batch(seed=7)), loss_config(clip=clip))
        assert math.isnan(loss.item())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_overflows_is_seen_in_loss_or_gradient(advantage):
    batch = {name: values.float() if values.is_floating_point() else values for name, values in random_batch(8).items()}
    batch["old_logprobs"][0] = -200.0
    batch["advantages"][0] = advantage
    loss, gradient, metrics = loss_and_gradient(batch, denominators_of(batch), loss_config())
    assert not (loss.isfinite() and gradient.isfinite().all())
    assert metrics["ratio_max"].value() == math.inf


def test_an_extreme_reference_does_not_break_a_step():
    """k3 of one token at exp(200) must not make the step infinite (the clamp in learner/kl.py)."""
    batch = {name: values.float() if values.is_floating_point() else values for name, values in random_batch(9).items()}
    batch["logprobs"][0] = batch["old_logprobs"][0] = -200.0
    batch["ref_logprobs"][0] = 0.0
    loss, gradient, _ = loss_and_gradient(batch, denominators_of(batch), loss_config())
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_float32_agrees_with_float64():
    batch = random_batch(seed=10)
    single = {name: values.float() if values.is_floating_point() else values for name, values in batch.items()}
    config = loss_config()
    loss, gradient, _ = loss_and_gradient(batch, denominators_of(batch), config)
    single_loss, single_gradient, _ = loss_and_gradient(single, denominators_of(batch), config)
    assert single_loss.dtype == torch.float32
    # 20 tokens; a ratio of logprobs of about 3 is off by six roundings
    torch.testing.assert_close(single_loss.double(), loss, atol=rounding(20, 3), rtol=0)
    torch.testing.assert_close(single_gradient.double(), gradient, atol=rounding(20, 3), rtol=0)
