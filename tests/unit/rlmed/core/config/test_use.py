"""What a user sets and nothing reads is refused (key, command, advice); an experiment's is not."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from rlmed.core.config.composing import compose_config, unused_overrides
from rlmed.core.config.overrides import CONFIG_GROUPS, group_options
from rlmed.core.config.rules import MODULES, RULES
from rlmed.core.config.use import Refusal, find_unused, plain_values, schema_keys

PROGRAMS = tuple(MODULES)
RAY = ("cluster=ray",)


@functools.cache
def composed(program: str, *overrides: str) -> Any:
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(program, list(overrides)), resolve=True)


def find(program: str, *overrides: str) -> list[Refusal]:
    return find_unused(program, overrides, CONFIG_GROUPS, lambda entries: composed(program, *entries))


def refused(program: str, *overrides: str) -> list[str]:
    return [refusal.override for refusal in find(program, *overrides)]


@pytest.mark.parametrize(
    ("program", "overrides", "text"),
    [
        # whatever the value, since the command never reads the key
        ("sft", "steps=300", "steps. Set sft.epochs and sft.batch_size"),
        ("sft", "+experiment=medvqa_600 profile=tiny steps=300", "steps. Set sft.epochs"),
        ("sft", "+experiment=medvqa_600 profile=tiny rollout.max_tokens=512", "rollout.max_tokens. Set eval"),
        ("sft", "algo.loss.kl_coef=0.04", "algo.loss.kl_coef. Only rlmed.launch learns"),
        ("sft", "reward.weights.format=1.0", "reward.weights. Only rlmed.launch learns"),
        ("reliability", "cluster.rollout_workers=1", "cluster.rollout_workers. It runs in one process"),
        ("evaluate", "eval.at_end=true", "eval.at_end. It evaluates once"),
        ("evaluate", "resume=null", "resume. It learns nothing"),
        ("evaluate", "loggers=[wandb]", "loggers. Only runs that learn"),
        ("train", "logging.offline=true", "logging.offline while loggers=['tensorboard']. It is for loggers other"),
        ("train", "logging.rollouts=2", "logging.rollouts while logging.rollouts_every=0. Set"),
        ("sft", "logging.rollouts_every=5", "logging.rollouts_every. It has no rollouts"),
        ("train", "sft.epochs=2.0", "sft.epochs. It is for rlmed.sft alone"),
        # an experiment's value, put back to the default
        ("sft", "+experiment=medvqa_600 profile=tiny algo=grpo", "algo.dynamic_sampling. Only"),
        ("train", "+experiment=medvqa_600 profile=tiny algo=grpo algo.max_refills=4", "while algo.dynamic_sampling=false"),
        ("reliability", "cluster=ray", "cluster.kind. It runs in one process"),
        ("evaluate", "cluster=ray cluster.learner_ranks=2", "cluster.learner_ranks. It has no learner"),
        ("sft", "cluster=ray rollout=vllm rollout.sleep=true", "rollout.sleep. No engine sleeps between"),
        ("reliability", "rollout=vllm", "rollout.engine=vllm. It samples in its own"),
        ("reliability", "cluster=ray_1gpu", "cluster.kind, cluster.gpus_per_worker, cluster.gpus_per_rank. It"),
        ("evaluate", "algo=dapo", "algo.dynamic_sampling, algo.loss.clip_ratio_high, algo.loss.kl_coef, "),
        ("sft", "steps=9", "steps. Set sft.epochs and sft.batch_size"),
        ("sft", "eval.every=5", "eval.every. It evaluates before and after"),
        ("sft", "rollout.max_tokens=9", "rollout.max_tokens. Set eval.max_tokens"),
        ("sft", "reward=unlabelled", "reward.weights. Only rlmed.launch learns"),
        ("sft", "+reward.weights.brevity=1", "reward.weights. Only"),
        ("sft", "learner.mini_batches=2", "learner.mini_batches. Set sft.epochs"),
        ("sft", "+debug=rollouts_only", "debug.learn, debug.record. It is for rlmed.launch"),
        ("sft", "data.selection={mode:pass_rate,min_pass_rate:0.2}", "data.selection.mode, data.selection.m"),
        ("evaluate", "learner.lr=1", "learner.lr. It learns nothing"),
        ("evaluate", "resume=auto", "resume. It learns nothing"),
        ("evaluate", "checkpoint.every=7", "checkpoint.every."),
        ("evaluate", "seed=4", "seed. Greedy answers"),
        ("evaluate", "eval.at_end=false", "eval.at_end. It evaluates once"),
        ("evaluate", "data.mix={MRI:1}", "data.mix. All rows are asked"),
        ("evaluate", "data=jsonl data.limit=7", "data.limit while data.source=jsonl and data.train=null. It limits"),
        ("train", "sft.epochs=3", "sft.epochs. It is for rlmed.sft alone"),
        ("train", "reliability.samples=8", "reliability.samples. It is for rlmed.reliability"),
        ("evaluate", "reliability.samples=8", "reliability.samples. It is for rlmed.reliability"),
        ("reliability", "learner.lr=1", "learner.lr. It learns nothing"),
        ("reliability", "rollout.temperature=1", "rollout.temperature. Evaluation is greedy"),
        ("train", "compare_to=x", "compare_to. Train without it, then"),
        ("sft", "eval.predictions=vlmevalkit", "eval.predictions. Train without it, then"),
        ("train", "algo.loss.dual_clip=2", "algo.loss.dual_clip while algo.loss.clip=ppo. Set algo.loss.clip=dual"),
        ("train", "algo.max_refills=1", "algo.max_refills while algo.dynamic_sampling=false. Set algo.dynamic"),
        ("train", "algo.loss.kl_coef=0 algo.loss.kl_estimator=k1", "while algo.loss.kl_coef=0. Set algo.loss.kl_coef above 0"),
        ("train", "algo=dapo algo.loss.kl_estimator=k2", "kl_estimator while algo.loss.kl_coef=0.0. Set algo"),
        ("train", "algo=grpo_released algo.loss.clip_ratio_low=0.1", "clip_ratio_low while algo.loss.clip=none. Set algo"),
        ("train", "algo.loss.old_logprobs=rollout algo.loss.importance_cap=2", "cap while algo.loss.old_logprobs=rollout."),
        ("train", "algo.loss.clip_ratio_high=0.3", "algo.loss.clip_ratio_high while algo.loss.old_logprobs="
         "learner and learner.epochs=1 and learner.mini_batches=1. "),
        ("train", "algo.loss.clip_ratio_high=0.3", "update: set learner.mini_batches or learner.epochs above 1"),
        ("train", "algo.max_staleness=1 algo.loss.clip_ratio_low=0.1", "clip_ratio_low while algo.loss.old_logprobs=learn"),
        ("train", "algo.loss.clip=dual", "algo.loss.clip=dual while algo.loss.old_logprobs=learner and lear"),
        ("train", "algo.loss.clip=cispo", "algo.loss.clip=cispo while algo.loss.old_logprobs=learner and le"),
        ("train", "algo.loss.ratio_level=sequence", "algo.loss.ratio_level=sequence while algo.loss.old_log"),
        ("train", "checkpoint.every=0 checkpoint.keep_last=5", "keep_last while checkpoint.every=0. There is one checkpoint"),
        ("sft", "checkpoint.every=0 checkpoint.keep_last=5", "keep_last while checkpoint.every=0. There is one checkpoint"),
        ("evaluate", "data.train=x data.eval=[y] data.phantom_seed=3", "data.phantom_seed while data.train=x "
         "and data.eval=['y']. With both files"),
        ("train", "data.train=x data.eval=[y] data.phantom_folder=z", "data.phantom_folder while data.train"),
        ("train", "data.selection.min_pass_rate=0.1", "while data.selection.mode=all. Set data.sel"),
        ("train", "data=jsonl data.phantom_seed=3", "data.phantom_seed while data.source=jsonl. Set data=ph"),
        ("train", "data=jsonl data.task=open", "data.task while data.source=jsonl. It is for generated data: set data=ph"),
        ("train", "data.train=x data.eval=[y] data.task=open", "data.task while data.train=x and data.eval=['y']. W"),
        ("train", "data=jsonl data.leakage=strict", "data.leakage=strict while data.source=jsonl and data.e"),
        ("train", "rollout.enforce_eager=true", "rollout.enforce_eager while rollout.engine=native. Set rol"),
        ("train", "rollout.on_push=finish", "rollout.on_push while algo.max_staleness=0. Set algo.max_stale"),
        ("train", "cluster.worker_logs=true", "cluster.worker_logs while cluster.kind=local. Set cluster=ra"),
        ("train", "cluster.rollout_workers=2", "cluster.rollout_workers while cluster.kind=local. Set clu"),
        ("train", "reward.timeout_s=2", "reward.timeout_s while reward.extra=[]. It bounds your own"),
        ("train", "preflight.enabled=false preflight.groups=2", "preflight.groups while preflight.enabled=f"),
        ("train", "eval.at_start=false eval.at_end=false eval.controls=false", "eval.controls while eval.at"),
        ("train", "eval.at_start=false eval.at_end=false eval.limit=3", "eval.at_end=false and eval.every=0. Nothing is e"),
        ("sft", "eval.at_start=false eval.at_end=false rollout.stop=[x]", "rollout.stop while eval.at_start"),
        ("sft", "eval.at_start=false eval.at_end=false rollout.max_completions=8", "rollout.max_completions"),
        ("sft", "eval.at_start=false eval.at_end=false rollout.prefill_tokens=8", "rollout.prefill_tokens"),
    ],
)  # fmt: skip
def test_an_override_that_does_nothing_is_refused(program: str, overrides: str, text: str) -> None:
    (refusal,) = find(program, *overrides.split())
    assert refusal.override == overrides.split()[-1]
    assert text in refusal.text
    command = "rlmed.launch" if program == "train" else f"rlmed.{program}"
    assert refusal.text.startswith(f"{refusal.override}: {command} does not read ")
    assert "\n" not in refusal.text


@pytest.mark.parametrize(
    "key", ["cluster.silence_timeout_s=9", "+cluster.runtime_env.pip=[rlmed]", "+cluster.worker_resources.a=1"]
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_rays_keys_do_something_with_ray_alone(program: str, key: str) -> None:
    assert refused(program, key) == [key]
    assert refused(program, *RAY, key) == ([*RAY, key] if program == "reliability" else [])


@pytest.mark.parametrize(
    ("program", "overrides"),
    [
        # what the command does anyway, and options that change nothing
        ("sft", "cluster=local rollout=native reward=format_choice"),
        ("sft", "rollout.engine=native"),
        ("evaluate", "algo=grpo"),
        # a value that is the default changes nothing while another key leaves it unread
        ("train", "cluster=local cluster.rollout_workers=1 algo.loss.dual_clip=3.0 algo.max_refills=4"),
        # what the command reads
        (
            "sft",
            "cluster.threads=1 rollout.stop=[x] rollout.max_completions=8 data.mix={MRI:1} learner.freeze=[vision]",
        ),
        (
            "reliability",
            "cluster.threads=1 reliability.samples=2 seed=4 learner.token_budget=99 compare_to=x name=mine",
        ),
        ("evaluate", "data=jsonl data.train=x data.limit=7 data.eval=[y] prompt=radiologist model=qwen2_vl_2b"),
        ("train", "cluster=ray_8gpu rollout=vllm rollout.tensor_parallel_size=2 cluster.weight_transfer=nccl"),
        ("train", "algo.loss.clip=dual algo.loss.dual_clip=2 learner.mini_batches=2"),
        ("train", "algo.loss.clip_ratio_high=0.3 learner.epochs=2"),
        ("train", "algo.loss.old_logprobs=rollout algo.loss.ratio_level=sequence algo.loss.clip_ratio_low=0.1"),
        ("train", "algo.loss.clip=none algo.max_staleness=1 rollout.on_push=finish"),
        ("train", "algo=gspo"),
        ("train", "checkpoint.every=7 checkpoint.keep_last=5"),
        ("train", "data.train=x data.phantom_seed=3"),
        ("train", "data=phantom_tasks data.task=open data.phantom_seed=3"),
        ("evaluate", "data.eval=[x] data.phantom_seed=3"),
        (
            "train",
            "data.selection.mode=pass_rate data.selection.min_pass_rate=0.1 data.phantom_seed=3 data.leakage=strict",
        ),
        ("train", "reward.extra=[a:b] reward.timeout_s=2 preflight.groups=2 algo=grpo_dynamic algo.max_refills=1"),
        ("train", "eval.at_start=false eval.limit=3 eval.controls=false"),
        ("train", "eval.at_start=false eval.at_end=false rollout.max_completions=8"),
        ("sft", "eval.at_start=false rollout.max_completions=8 rollout.stop=[x]"),
        # one switch off takes its details along only where they were set
        (
            "train",
            "preflight.enabled=false eval.at_start=false eval.at_end=false algo.loss.kl_coef=0 algo.loss.clip=none",
        ),
        ("train", "cluster=ray rollout=native data=jsonl data.train=x"),
        ("evaluate", "cluster=ray_8gpu rollout=vllm rollout.tensor_parallel_size=2"),
        ("sft", "cluster=ray_8gpu rollout=vllm cluster.weight_transfer=nccl"),
        # an option is a set: some of it may be for other cases
        ("train", "data=jsonl"),
        # half a run is the same command line with one word more
        ("train", "+debug=rollouts_only learner.lr=1 algo=gspo checkpoint.every=9 eval.every=3"),
        ("train", "+debug=recorded debug.recorded=x rollout.top_p=0.9 preflight.groups=3"),
        ("train", "+debug=fake_engine rollout.top_p=0.9"),
        ("evaluate", "+debug=fake_engine"),
    ],
)
def test_what_does_something_or_changes_nothing_is_taken(program: str, overrides: str) -> None:
    assert refused(program, *overrides.split()) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_an_experiment_brings_along_is_not_refused(program: str) -> None:
    for name in ("medvqa_600", "medvqa_600_dapo", "medvqa_600_align"):
        for profile in group_options("profile"):
            assert refused(program, f"+experiment={name}", f"profile={profile}", "model.dtype=float32") == []


@pytest.mark.parametrize("group", [name for name in CONFIG_GROUPS if name not in ("experiment", "profile", "debug")])
def test_every_option_is_for_training(group: str) -> None:
    with_ray = RAY if group == "rollout" else ()
    assert [refused("train", *with_ray, f"{group}={name}") for name in group_options(group)] == [[]] * len(
        group_options(group)
    )


def test_an_experiment_is_where_changes_count_from() -> None:
    experiment = ("+experiment=medvqa_600", "profile=tiny")  # with group_size 8
    assert refused("sft", *experiment) == []
    assert refused("sft", *experiment, "algo.group_size=16") == ["algo.group_size=16"]
    assert refused("train", *experiment, "algo.max_refills=2") == []  # it has dynamic sampling
    assert refused("train", *experiment, "algo=dapo", "algo.loss.dual_clip=2") == ["algo.loss.dual_clip=2"]


def test_what_an_option_brings_may_be_read_by_way_of_another_override() -> None:
    def without_kl(entries: Sequence[str]) -> Any:
        # so that GSPO brings nothing but ratio and bounds
        return composed("train", *entries, "algo.loss.kl_coef=0")

    def overrides_refused(*given: str) -> list[str]:
        return [refusal.override for refusal in find_unused("train", given, CONFIG_GROUPS, without_kl)]

    assert overrides_refused("algo=gspo") == ["algo=gspo"]
    assert overrides_refused("algo=gspo", "learner.mini_batches=4") == []


def test_outside_of_a_command_the_answer_is_the_same() -> None:
    given = ["steps=3", "sft.epochs=1"]
    assert unused_overrides("sft", given) == find("sft", *given) != []


def test_all_that_does_nothing_is_said_at_once() -> None:
    given = (
        "cluster=ray",
        "rollout=vllm",
        "cluster.threads=1",
        "rollout.tensor_parallel_size=2",
        "steps=3",
        "sft.epochs=1",
    )
    assert refused("reliability", *given) == [entry for entry in given if entry != "cluster.threads=1"]


def test_every_key_named_by_a_rule_exists() -> None:
    known = set(schema_keys())
    sections = {key.rpartition(".")[0] for key in known}
    values = plain_values(dataclasses.asdict(compose_config("train", ())))
    for rule in RULES:
        assert set(rule.keys) <= known | sections
        conditions = {**rule.when, **rule.unless}
        assert conditions.keys() <= known
        assert set(rule.programs) <= set(PROGRAMS)
        assert re.fullmatch(r"[A-Z+v].*[^.]", rule.advice)
        for key, idle in conditions.items():
            if key in values:  # a condition that could never hold would hide a typing mistake
                assert all(value is None or isinstance(value, type(values[key]) | int | list) for value in idle), key


@pytest.mark.slow
def test_the_command_itself_refuses_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlmed.sft", "compare_to=x", f"hydra.run.dir={tmp_path / 'run'}"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: compare_to=x: rlmed.sft does not read compare_to." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()
