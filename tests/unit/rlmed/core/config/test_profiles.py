"""What each experiment sets with each profile: all keys that differ from defaults, no other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest

from rlmed.core.config.composing import compose_config
from rlmed.core.config.overrides import expand, group_options
from rlmed.core.config.use import plain_values

PROFILES = {
    "paper": {
        "model.path": "Qwen/Qwen2-VL-2B-Instruct",
        "model.min_pixels": 3136,
        "model.max_pixels": 401408,
        "data.source": "jsonl",
        "data.train": "data/medvqa_600/train_mri.jsonl",
        "data.eval": [f"data/medvqa_600/test_{name}.jsonl" for name in ("mri", "ct", "xray")],
        "data.max_prompt_tokens": 1024,
        "data.phantom_folder": None,
        "steps": 300,
        "algo.group_size": 4,
        "algo.groups_per_step": 4,
        "algo.dynamic_sampling": False,
        "rollout.temperature": 1.0,
        "rollout.max_tokens": 512,
        "eval.every": 100,
        "eval.max_tokens": 512,
        "learner.lr": 1e-6,
        "learner.gradient_checkpointing": True,
        "sft.epochs": 2.0,
        "sft.batch_size": 16,
    },
    "tiny": {
        "model.path": "embedded:tiny_base",
        "data.source": "phantom",
        "steps": 100,
        "algo.group_size": 8,
        "algo.groups_per_step": 8,
        "algo.dynamic_sampling": True,
        "algo.max_refills": 1,
        "rollout.max_tokens": 64,
        "eval.every": 0,
        "eval.max_tokens": 64,
        "learner.lr": 6e-5,
        "learner.warmup_steps": 5,
        "sft.batch_size": 16,
    },
}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "": {},
    "_align": {"data.shuffle_options": True, "sft.target": "option", "learner.freeze": ["vision"]},
    "_answer_only": {"reward.weights": {"format": 0.0, "choice": 1.0, "answer_format": 1.0}},
    "_dapo": {
        "algo.loss.clip_ratio_high": 0.28,
        "algo.loss.aggregation": "token_mean",
        "algo.loss.kl_coef": 0.0,
        "algo.dynamic_sampling": True,
        "algo.loss.mask_truncated": True,
    },
    "_dr_grpo": {
        "algo.advantage": "dr_grpo",
        "algo.loss.aggregation": "sequence_sum",
        "algo.loss.kl_coef": 0.0,
        "algo.dynamic_sampling": False,
    },
    "_gspo": {
        "algo.loss.ratio_level": "sequence",
        "algo.loss.clip_ratio_low": 3e-4,
        "algo.loss.clip_ratio_high": 4e-4,
        "algo.loss.kl_coef": 0.0,
        "algo.dynamic_sampling": False,
    },
    "_released": {"algo.loss.clip": "none", "algo.dynamic_sampling": False, "seed": 42, "data.limit": 500},
    "_sft": {"sft.target": "answer"},
}
BOTH = {
    ("_align", "paper"): {"learner.lr": 1e-5},
    ("_align", "tiny"): {"learner.lr": 1e-4},
    ("_released", "paper"): {"steps": 250},
}
"""What an experiment needs in one profile."""
TEXTS = ("data.download", "prompt.template", "prompt.by_task")


@functools.cache
def values(*overrides: str) -> dict[str, Any]:
    return plain_values(dataclasses.asdict(compose_config("train", overrides)))


def test_the_table_is_whole() -> None:
    assert group_options("experiment") == sorted(f"medvqa_600{suffix}" for suffix in EXPERIMENTS)
    assert group_options("profile") == list(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("suffix", EXPERIMENTS)
def test_an_experiment_sets_these_keys_and_no_other(suffix: str, profile: str) -> None:
    found, default = values(f"+experiment=medvqa_600{suffix}", f"profile={profile}"), values()
    given = PROFILES[profile] | EXPERIMENTS[suffix] | BOTH.get((suffix, profile), {})
    names = {"name": f"medvqa_600{suffix}_{profile}", "profile": profile}
    expected = default | given | names | {key: found[key] for key in TEXTS}
    assert found == expected
    prompt = "answer_only" if suffix == "_answer_only" else "paper"
    for key in ("prompt.template", "prompt.by_task"):
        assert found[key] == values(f"prompt={prompt}")[key]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_alone_sets_its_own_keys(profile: str) -> None:
    found = values(*expand([f"profile={profile}"], cuda=True))
    expected = values() | PROFILES[profile] | {"profile": profile, "data.download": found["data.download"]}
    assert found == expected


@pytest.mark.parametrize(("given", "cuda", "profile"), [
    ([], False, "tiny"), ([], True, "paper"), (["profile=paper"], False, "paper"), (["profile=tiny"], True, "tiny"),
    (["profile=tiny", "profile=paper"], False, "paper"),
])  # fmt: skip
def test_the_hardware_chooses_unless_the_command_line_does(given: list[str], cuda: bool, profile: str) -> None:
    config = compose_config("train", expand(["+experiment=medvqa_600_dapo", *given], cuda=cuda))
    assert (config.profile, config.steps) == (profile, PROFILES[profile]["steps"])


def test_the_command_line_has_the_last_word() -> None:
    config = compose_config("train", ["+experiment=medvqa_600_released", "profile=tiny", "algo=cispo", "steps=7"])
    assert (config.steps, config.algo.loss.clip, config.model.path) == (7, "cispo", "embedded:tiny_base")
