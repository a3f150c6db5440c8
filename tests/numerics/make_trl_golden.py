"""Write golden/trl_grpo.json: losses and gradients of TRL's GRPO on random tensors.

Run by hand, not by the tests.

    pip install trl==1.16.0 accelerate datasets      # in an environment of its own, beside torch and transformers
    python tests/numerics/make_trl_golden.py

What runs is TRL's own `GRPOTrainer._compute_loss`. Its `self` is a stand-in with the attributes
that the method reads, set as `GRPOTrainer.__init__` sets them from a real `GRPOConfig`; the model
is replaced by given log-probabilities. Everything is float64, so that the golden numbers carry no
rounding of their own. One thing is computed here and not by TRL: the weights min(exp(old -
sampled), cap), which TRL makes while generating and hands to the method as an input.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

OUTPUT = Path(__file__).parent / "golden" / "trl_grpo.json"
MAX_COMPLETION_LENGTH = 9

# Arguments of GRPOConfig; "on_policy" leaves old_per_token_logps away, which TRL replaces by the
# detached current ones.
CASES: dict[str, dict[str, Any]] = {
    "grpo_on_policy": {"loss_type": "grpo", "beta": 0.04, "on_policy": True},
    "grpo": {"loss_type": "grpo", "epsilon": 0.2},
    "grpo_clip_higher_kl": {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.04},
    "grpo_two_sided": {"loss_type": "grpo", "epsilon": 0.2, "delta": 1.5},
    "gspo": {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.15, "importance_sampling_level": "sequence"},
    "gspo_kl": {"loss_type": "grpo", "epsilon": 0.1, "beta": 0.1, "importance_sampling_level": "sequence"},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon": 0.2},
    "dr_grpo_kl": {"loss_type": "dr_grpo", "epsilon": 0.2, "beta": 0.04},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "dapo_kl_weighted": {"loss_type": "dapo", "epsilon": 0.2, "beta": 0.04, "vllm_importance_sampling_clip_max": 1.2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "cispo_kl": {"loss_type": "cispo", "epsilon_high": 1.3, "beta": 0.04},
}


def random_tensors(completions: int = 8, length: int = 7, seed: int = 5) -> dict[str, Tensor]:
    """Padded [B, T] float64 tensors, rounded for a small file; the mask of ragged completions.

    The seed is one where every clip of CASES is active; the test checks that.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logps = -0.1 - 3 * torch.rand(completions, length, generator=generator, dtype=torch.float64)
    # an offset per completion, so that whole completions are clipped too
    old = logps + 0.3 * normal(completions, length) + 0.3 * normal(completions, 1)
    tensors = {
        "logps": logps,
        "old": old,
        "sampled": old + 0.2 * normal(completions, length),
        "ref": logps + 0.5 * normal(completions, length),
        "advantages": normal(completions) - 0.2,
    }
    lengths = torch.randint(1, length + 1, (completions,), generator=generator)
    rounded = {name: values.mul(1000).round().div(1000) for name, values in tensors.items()}
    return {**rounded, "mask": (torch.arange(length) < lengths[:, None]).long()}


def stand_in(case: dict[str, Any], logps: Tensor) -> SimpleNamespace:
    """What `_compute_loss` reads from the trainer: one process, one micro-batch, a dense model."""
    weighted = "vllm_importance_sampling_clip_max" in case
    settings = {name: value for name, value in case.items() if name != "on_policy"}
    args = GRPOConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        max_completion_length=MAX_COMPLETION_LENGTH,
        # True, TRL's default, multiplies the KL term by the ratio; GRPO's paper does not
        use_bias_correction_kl=False,
        **settings,
    )
    args.steps_per_generation = 1
    return SimpleNamespace(
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda values: values, reduce=lambda values, reduction: values, sync_gradients=True
        ),
        current_gradient_accumulation_steps=1,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        use_vllm=weighted,
        vllm_importance_sampling_correction=args.vllm_importance_sampling_correction,
        loss_type=args.loss_type,
        importance_sampling_level=args.importance_sampling_level,
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        top_entropy_quantile=args.top_entropy_quantile,
        max_completion_length=args.max_completion_length,
        beta=args.beta,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon_high if args.epsilon_high is not None else args.epsilon,
    )


def run_case(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Loss, gradient with respect to the log-probabilities, and the metrics that TRL logged."""
    logps, mask = tensors["logps"].clone().requires_grad_(), tensors["mask"]
    trainer = stand_in(case, logps)
    prompts = torch.ones(len(mask), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompts,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": tensors["advantages"],
        "ref_per_token_logps": tensors["ref"],
        "num_items_in_batch": mask.sum(),
    }
    if not case.get("on_policy", False):
        inputs["old_per_token_logps"] = tensors["old"]
    if trainer.use_vllm:
        ratio = (tensors["old"] - tensors["sampled"]).exp()
        inputs["importance_sampling_ratio"] = ratio.clamp(max=trainer.args.vllm_importance_sampling_clip_max)
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items() if name != "entropy"}
    # 12 decimals are far below the tolerance of the test
    gradient = [[round(value, 12) for value in row] for row in logps.grad.tolist()]
    return {"settings": case, "loss": loss.item(), "gradient": gradient, "metrics": metrics}


def main() -> None:
    """Run every case and write the file, one line per case."""
    tensors = random_tensors()
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    head = {"versions": versions, "max_completion_length": MAX_COMPLETION_LENGTH}
    lines = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    lines += [f'"{name}": {json.dumps(values.tolist())}' for name, values in tensors.items()]
    cases = ",\n".join(f'"{name}": {json.dumps(run_case(case, tensors))}' for name, case in CASES.items())
    lines.append(f'"cases": {{\n{cases}\n}}')
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
