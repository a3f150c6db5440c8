"""Our loss and gradient against those of TRL's GRPO on the same tensors.

They are in golden/trl_grpo.json, made by make_trl_golden.py.

Where TRL's conventions differ, our settings or denominators are chosen to fit:

| TRL | here |
| --- | --- |
| `epsilon`, `epsilon_high` (default: `epsilon`) | `clip_ratio_low`, `clip_ratio_high` |
| `delta`: ratio bounded by `delta` before the minimum is taken, for every advantage | clip="dual": the same numbers, because a positive advantage is already bounded by 1 + epsilon_high < delta |
| loss_type="cispo": weight min(ratio, `epsilon_high`), no lower bound | clip_ratio_high = epsilon_high - 1, clip_ratio_low = 1 |
| "grpo" divides by the number of completions in the micro-batch, then by the accumulation steps | `sequences`, counted over the step; equal for one micro-batch, or for micro-batches of one size |
| "dapo", "cispo" divide by the tokens of the generation batch, scaled to one accumulation window (`num_items_in_batch`) | `tokens`, counted over the step; equal for one micro-batch |
| "dr_grpo" divides by completions * `max_completion_length` | aggregation="sequence_sum", `max_tokens` |
| `use_bias_correction_kl`, True by default in 1.16: the KL term times the ratio (DeepSeek-V3.2, arXiv 2512.02556) | the KL term is not weighted, as in GRPO's paper; the golden numbers were made with False |
| completions without a trained token count in "grpo" and "dr_grpo" | they do not; the golden tensors have none |
| metrics of importance_sampling_level="sequence" are means over completions | over tokens, so those are not compared |
"""  # noqa: E501 (a table)

import json
from pathlib import Path

import pytest
import torch

from learner.losses import count_denominators, policy_loss
from tests.configs import loss_config
from tests.rounding import rounding

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl_grpo.json").read_text(encoding="utf-8"))
CASES = GOLDEN["cases"]
AGGREGATION = {"grpo": "sequence_mean", "dr_grpo": "sequence_sum", "dapo": "token_mean", "cispo": "token_mean"}


def our_config(settings):
    """Our settings for the arguments of a GRPOConfig."""
    low = settings.get("epsilon", 0.2)
    high = settings.get("epsilon_high", low)
    clip = {"clip": "ppo", "clip_ratio_low": low, "clip_ratio_high": high}
    if settings["loss_type"] == "cispo":
        clip = {"clip": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": high - 1.0}
    elif "delta" in settings:
        clip |= {"clip": "dual", "dual_clip": settings["delta"]}
    return loss_config(
        ratio_level=settings.get("importance_sampling_level", "token"),
        **clip,
        kl_coef=settings.get("beta", 0.0),
        aggregation=AGGREGATION[settings["loss_type"]],
        importance_cap=settings.get("vllm_importance_sampling_clip_max"),
    )


def run_ours(settings, dtype, **changes):
    """Loss, gradient as [B, T] and metrics of one case; the padding goes along as masked tokens."""

    def flat(name):
        return torch.tensor(GOLDEN[name], dtype=dtype).flatten()

    mask = torch.tensor(GOLDEN["mask"], dtype=torch.bool)
    logprobs = flat("logps").requires_grad_()
    loss, metrics = policy_loss(
        logprobs,
        logprobs.detach() if settings.get("on_policy", False) else flat("old"),
        flat("sampled"),
        flat("ref"),
        torch.tensor(GOLDEN["advantages"], dtype=dtype),
        torch.arange(len(mask)).repeat_interleave(mask.shape[1]),
        mask.flatten(),
        count_denominators(mask.sum(1).tolist(), GOLDEN["max_completion_length"]),
        our_config({**settings, **changes}),
    )
    loss.backward()
    return loss.detach(), logprobs.grad.reshape(mask.shape), metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_trl(name, dtype):
    tolerance = 1e-12 + rounding(
        20, 3, dtype
    )  # the file's digits; about ten roundings of logprobs of about 3, on both sides
    case = CASES[name]
    loss, gradient, _ = run_ours(case["settings"], dtype)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(case["loss"], abs=tolerance)
    torch.testing.assert_close(gradient, torch.tensor(case["gradient"], dtype=dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if "importance_sampling_level" not in CASES[name]["settings"]])
def test_metrics_equal_trl(name):
    golden, (_, _, metrics) = CASES[name]["metrics"], run_ours(CASES[name]["settings"], torch.float64)
    names = {"kl": "kl", "clip_ratio/low_mean": "clip_fraction_low", "clip_ratio/high_mean": "clip_fraction_high"}
    compared = {theirs: ours for theirs, ours in names.items() if theirs in golden}
    # For cispo TRL counts truncated weights only where the advantage is positive, ours wherever a
    # weight was changed.
    assert compared or name == "cispo"
    for theirs, ours in compared.items():
        # TRL counts clips in float32
        assert metrics[ours].value() == pytest.approx(golden[theirs], abs=rounding(4))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("grpo", {"epsilon": 0.9}),
        ("grpo_clip_higher_kl", {"epsilon_high": 0.2}),
        ("grpo_two_sided", {"delta": 100.0}),
        ("grpo_on_policy", {"beta": 0.0}),
        ("gspo", {"epsilon": 0.9}),
        ("gspo", {"epsilon_high": 0.9}),
        ("gspo_kl", {"importance_sampling_level": "token"}),
        ("dr_grpo", {"loss_type": "grpo"}),
        ("dapo", {"loss_type": "grpo"}),
        ("dapo_kl_weighted", {"vllm_importance_sampling_clip_max": 100.0}),
        ("cispo", {"epsilon_high": 100.0}),
    ],
)
def test_each_setting_matters_on_the_golden_tensors(name, changes):
    """Otherwise agreement with TRL would prove nothing about that setting."""
    loss, _, _ = run_ours(CASES[name]["settings"], torch.float64, **changes)
    assert abs(loss.item() - CASES[name]["loss"]) > 1e-4
