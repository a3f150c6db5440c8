"""Policy-loss settings and inputs to refuse, denominators, and how metrics are reduced."""

import math

import pytest
import torch

from learner.losses import LossDenominators, count_denominators, policy_loss
from learner.metrics import MetricMax, MetricSum, mean_metric, merge_metrics
from rlmed.core.config.checks import ConfigError
from tests.configs import loss_config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ratio_level", "word"),
        ("clip", "hard"),
        ("kl_estimator", "k4"),
        ("aggregation", "mean"),
        ("clip_ratio_low", 0.0),
        ("clip_ratio_low", 1.5),
        ("clip_ratio_low", math.nan),
        ("clip_ratio_high", 0.0),
        ("clip_ratio_high", math.inf),
        ("dual_clip", 1.0),
        ("dual_clip", math.nan),
        ("kl_coef", -0.1),
        ("kl_coef", math.nan),
        ("importance_cap", 0.5),
        ("importance_cap", math.inf),
    ],
)
def test_impossible_settings_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=rf"algo\.loss\.{key}={value!r}"):
        loss_config(**{key: value})


def test_a_penalty_without_estimator_is_refused():
    with pytest.raises(ValueError, match=r"algo\.loss\.kl_coef=0\.04 needs an estimator"):
        loss_config(kl_estimator="none")
    assert loss_config(kl_estimator="none", kl_coef=0.0).kl_coef == 0.0


def call(config=loss_config(), denominators=LossDenominators(3.0, 2.0, 8), **overrides):  # noqa: B008 (frozen)
    inputs = {
        "logprobs": torch.tensor([-1.0, -2.0, -0.5]),
        "old_logprobs": torch.tensor([-1.0, -2.0, -0.5]),
        "rollout_logprobs": torch.tensor([-1.0, -2.0, -0.5]),
        "ref_logprobs": torch.tensor([-1.0, -2.0, -0.5]),
        "advantages": torch.tensor([1.0, -1.0]),
        "sequence_ids": torch.tensor([0, 0, 1]),
        "loss_mask": torch.ones(3, dtype=torch.bool),
    }
    return policy_loss(**{**inputs, **overrides}, denominators=denominators, config=config)


def test_the_inputs_that_the_next_tests_spoil_are_accepted():
    assert math.isfinite(call()[0].item())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ref_logprobs": None}, "kl_coef=0.04 but ref_logprobs is None"),
        ({"old_logprobs": torch.zeros(2)}, r"old_logprobs \(2,\) does not fit logprobs \(3,\)"),
        ({"sequence_ids": torch.zeros(4, dtype=torch.int64)}, "sequence_ids"),
        ({"loss_mask": torch.ones(3, dtype=torch.int64)}, "loss_mask is torch.int64"),
        ({"logprobs": torch.zeros(1, 3)}, "flat packed"),
        ({"advantages": torch.zeros(2, 1)}, "flat packed"),
        ({"rollout_logprobs": torch.zeros(3, dtype=torch.bfloat16)}, "rollout_logprobs are torch.bfloat16"),
        ({"old_logprobs": torch.zeros(3, requires_grad=True)}, "old_logprobs carry gradients"),
        ({"ref_logprobs": torch.zeros(3, requires_grad=True)}, "ref_logprobs carry gradients"),
        ({"denominators": LossDenominators(0.0, 0.0, 8)}, "count_denominators"),
        ({"denominators": LossDenominators(3.0, 2.0, 0)}, "count_denominators"),
    ],
)
def test_inputs_that_would_train_wrong_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        call(**overrides)


def test_denominators_count_trained_tokens_and_completions():
    # 5 + 0 + 9 tokens; the completion without a trained token is no completion
    assert count_denominators([5, 0, 9], max_tokens=512) == LossDenominators(14.0, 2.0, 512)
    assert count_denominators([], max_tokens=4) == LossDenominators(0.0, 0.0, 4)


def test_metrics_reduce_to_the_mean_over_tokens_not_to_a_mean_of_means():
    # 1 of 1 and 1 of 3: mean of all tokens 2/4, mean of means 2/3
    parts = [
        {"share": mean_metric(torch.tensor([1.0])), "top": MetricMax(torch.tensor(3.0))},
        {"share": mean_metric(torch.tensor([0.0, 1.0, 0.0])), "top": MetricMax(torch.tensor(2.0))},
    ]
    merged = merge_metrics(parts)
    assert {name: metric.value() for name, metric in merged.items()} == {"share": 0.5, "top": 3.0}


def test_a_metric_of_nothing_is_nan():
    assert math.isnan(mean_metric(torch.zeros(0)).value())


def test_a_mean_and_a_maximum_of_one_name_do_not_merge():
    mean, largest = MetricSum(torch.tensor(1.0), torch.tensor(1.0)), MetricMax(torch.tensor(1.0))
    with pytest.raises(AssertionError, match="share a name"):
        merge_metrics([{"x": mean}, {"x": largest}])
