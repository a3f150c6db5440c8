"""Keys that a command ignores, always or by other keys' values, and what to set instead; see `use`.

Two kinds are harmless and have no rule: settings of the half of a run that a debug mode skips (the
same command line plus one word), and evaluation settings without a file to evaluate on (the run
says so).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlmed.core.config.rewarding import EmbeddingConfig, JudgeConfig, RadEvalConfig
from rlmed.core.config.running import ClusterConfig
from rlmed.core.config.schema import LearnerConfig, LoraConfig

MODULES = {
    "train": "rlmed.launch",
    "sft": "rlmed.sft",
    "evaluate": "rlmed.evaluate",
    "reliability": "rlmed.reliability",
}
"""Command by program of `conf/`."""
RECIPES = ("experiment", "profile")
"""Groups whose options set keys of all sections, for all commands: changes count from there."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Keys without effect.

    Example:
        Rule(keys=("algo.loss.dual_clip",), unless={"algo.loss.clip": ("dual",)}, advice="Set
        algo.loss.clip=dual")
    """

    keys: tuple[str, ...]
    """Keys, or whole sections."""
    programs: tuple[str, ...] = tuple(MODULES)
    """Programs in which they have no effect."""
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """No effect while each of these keys has one of these values; empty means always."""
    unless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """No effect unless one of these keys has one of these values."""
    values: tuple[Any, ...] = ()
    """The keys' own values without effect; empty means all."""
    advice: str
    """What to do instead: a sentence without its full stop."""

    def covers(self, key: str, value: Any) -> bool:
        """Return True if the rule applies to `key` set to `value`."""
        named = any(f"{key}.".startswith(f"{name}.") for name in self.keys)
        return named and (not self.values or value in self.values)

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Return True if the conditions hold for these values of all keys."""
        idle = (key in values and values[key] in given for key, given in self.when.items())
        active = (key not in values or values[key] in given for key, given in self.unless.items())
        return all(idle) and not any(active)

    @property
    def conditional(self) -> bool:
        """True if it depends on other keys."""
        return bool(self.when or self.unless)


def _keys(section: str, cls: type[Any], *, but: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{section}.{entry.name}" for entry in dataclasses.fields(cls) if entry.name not in but)


TRAINING, EVALUATE = ("train", "sft"), ("evaluate", "reliability")
WITHOUT_ROLLOUTS = ("sft", *EVALUATE)
RAY = _keys("cluster", ClusterConfig, but=("kind", "threads", "check_memory"))
LEARNER_RANKS = tuple(
    f"cluster.{name}"
    for name in (
        "learner_ranks", "gpus_per_rank", "learner_resources", "weight_transfer", "push_timeout_s", "learner_timeout_s"
    )
)  # fmt: skip
VLLM = tuple(
    f"rollout.{name}"
    for name in ("tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib", "enforce_eager", "sleep")
)
WITHOUT_ENDS = {"eval.at_start": (False,), "eval.at_end": (False,)}
FROM_FILES = {"data.source": ("jsonl",)}
RATIO_IS_1 = {"algo.loss.old_logprobs": ("learner",), "learner.epochs": (1,), "learner.mini_batches": (1,)}
SEVERAL_UPDATES = "The ratio is 1 in a batch's first update: set learner.mini_batches or learner.epochs above 1"

RULES = (
    # what other commands are for
    Rule(keys=("steps",), programs=("sft",), advice="Set sft.epochs and sft.batch_size"),
    Rule(keys=("steps", "checkpoint", "resume"), programs=EVALUATE, advice="It learns nothing: leave it out"),
    Rule(
        keys=("algo", "reward"), programs=WITHOUT_ROLLOUTS, advice="Only rlmed.launch learns from rewards: leave it out"
    ),
    Rule(keys=("preflight", "debug"), programs=WITHOUT_ROLLOUTS, advice="It is for rlmed.launch alone: leave it out"),
    Rule(keys=("sft",), programs=("train", *EVALUATE), advice="It is for rlmed.sft alone: leave it out"),
    Rule(keys=("loggers", "logging"), programs=EVALUATE, advice="Only runs that learn are logged: leave it out"),
    Rule(
        keys=("logging.rollouts_every", "logging.rollouts"),
        programs=("sft",),
        advice="It has no rollouts: leave it out",
    ),
    Rule(
        keys=("logging.project", "logging.run_name", "logging.offline", "logging.tracking_uri"),
        when={"loggers": ([], ["tensorboard"])},
        advice="It is for loggers other than TensorBoard: set loggers=[wandb], [mlflow] or [trackio]",
    ),
    Rule(
        keys=("logging.rollouts",),
        when={"logging.rollouts_every": (0,)},
        advice="Set logging.rollouts_every above 0",
    ),
    Rule(keys=("logging.rollouts_every",), when={"loggers": ([],)}, advice="Nothing is logged: set loggers"),
    Rule(
        keys=("reliability",),
        programs=("train", "sft", "evaluate"),
        advice="It is for rlmed.reliability alone: leave it out",
    ),
    Rule(
        keys=("compare_to", "eval.predictions"),
        programs=TRAINING,
        advice="Train without it, then run python -m rlmed.evaluate model=RUN/checkpoints/step-N with it",
    ),
    # one process, greedy completions
    Rule(
        keys=("rollout.engine",),
        values=("vllm",),
        programs=("reliability",),
        advice="It samples in its own process, with the native engine: leave rollout=vllm out",
    ),
    Rule(keys=("cluster.kind", *RAY, *VLLM), programs=("reliability",), advice="It runs in one process: leave it out"),
    Rule(keys=LEARNER_RANKS, programs=("evaluate",), advice="It has no learner: leave it out"),
    Rule(
        keys=("rollout.sleep",),
        programs=("sft", "evaluate"),
        advice="No engine sleeps between evaluations: leave it out",
    ),
    Rule(
        keys=("rollout.temperature", "rollout.top_p", "rollout.top_k"),
        programs=WITHOUT_ROLLOUTS,
        advice="Evaluation is greedy, and rlmed.reliability samples at temperature 1: leave it out",
    ),
    Rule(keys=("rollout.max_tokens",), programs=WITHOUT_ROLLOUTS, advice="Set eval.max_tokens"),
    Rule(
        keys=("rollout.on_push", "rollout.max_mismatch_kl"),
        programs=WITHOUT_ROLLOUTS,
        advice="Only rlmed.launch pushes weights: leave it out",
    ),
    # adapters
    Rule(
        keys=tuple(f"learner.lora.{entry.name}" for entry in dataclasses.fields(LoraConfig) if entry.name != "rank"),
        when={"learner.lora.rank": (None,)},
        advice="Set learner=lora",
    ),
    Rule(
        keys=("learner.freeze",),
        unless={"learner.lora.rank": (None,)},
        advice="All weights are frozen below adapters: set learner.lora.target",
    ),
    # supervised fine-tuning
    Rule(
        keys=("learner.epochs", "learner.mini_batches"), programs=("sft",), advice="Set sft.epochs and sft.batch_size"
    ),
    Rule(
        keys=("eval.every",),
        programs=("sft",),
        advice="It evaluates before and after: run rlmed.evaluate on the checkpoints between",
    ),
    Rule(
        keys=("data.selection",),
        programs=WITHOUT_ROLLOUTS,
        advice="Only rlmed.launch samples and so knows pass rates: leave it out",
    ),
    # evaluation
    Rule(
        keys=("eval.every", "eval.at_start", "eval.at_end"), programs=EVALUATE, advice="It evaluates once: leave it out"
    ),
    Rule(
        keys=("data.mix", "data.shuffle_options"),
        programs=EVALUATE,
        advice="All rows are asked unchanged; eval.controls=true adds other orders of the options",
    ),
    Rule(
        keys=_keys("learner", LearnerConfig, but=("token_budget",)),
        programs=EVALUATE,
        advice="It learns nothing: leave it out",
    ),
    Rule(
        keys=("seed", "learner.token_budget"),
        programs=("evaluate",),
        advice="Greedy answers don't depend on it: leave it out",
    ),
    Rule(
        keys=("data.limit",),
        programs=EVALUATE,
        when={**FROM_FILES, "data.train": (None,)},
        advice="It limits the training rows: give data.train, or set eval.limit",
    ),
    # when evaluations are
    Rule(
        keys=("eval.controls",),
        programs=TRAINING,
        when=WITHOUT_ENDS,
        advice="Controls are measured at the start and end of a run: set eval.at_end=true",
    ),
    Rule(
        keys=("eval.limit", "eval.max_tokens", "eval.report_metrics"),
        programs=("train",),
        when={**WITHOUT_ENDS, "eval.every": (0,)},
        advice="Nothing is evaluated: set eval.at_end=true",
    ),
    Rule(
        keys=("eval.limit", "eval.max_tokens", "eval.report_metrics"),
        programs=("sft",),
        when=WITHOUT_ENDS,
        advice="Nothing is evaluated: set eval.at_end=true",
    ),
    Rule(
        keys=("rollout.stop", "rollout.max_completions", "rollout.prefill_tokens"),
        programs=("sft",),
        when=WITHOUT_ENDS,
        advice="Only evaluations sample here: set eval.at_end=true",
    ),
    Rule(keys=("preflight.groups",), when={"preflight.enabled": (False,)}, advice="Set preflight.enabled=true"),
    Rule(
        keys=("checkpoint.keep_last",),
        programs=TRAINING,
        when={"checkpoint.every": (0,)},
        advice="There is one checkpoint, at the end: set checkpoint.every above 0",
    ),
    # data
    Rule(keys=("data.phantom_seed", "data.phantom_folder"), when=FROM_FILES, advice="Set data=phantom"),
    Rule(keys=("data.task",), when=FROM_FILES, advice="It is for generated data: set data=phantom_tasks"),
    Rule(
        keys=("data.phantom_seed", "data.phantom_folder", "data.task"),
        unless={"data.train": (None,), "data.eval": ([],)},
        advice="With both files given nothing is generated: drop it, or one of the files",
    ),
    Rule(
        keys=("data.leakage",),
        values=("strict",),
        programs=TRAINING,
        when={**FROM_FILES, "data.eval": ([],)},
        advice="There is nothing to compare the training rows with: give data.eval",
    ),
    Rule(
        keys=tuple(
            f"data.selection.{name}" for name in ("window", "min_pass_rate", "max_pass_rate", "cooldown_epochs")
        ),
        when={"data.selection.mode": ("all",)},
        advice="Set data.selection.mode=pass_rate",
    ),
    # algorithm and rewards
    Rule(
        keys=("algo.loss.clip_ratio_low", "algo.loss.clip_ratio_high"),
        when={"algo.loss.clip": ("none",)},
        advice="Set algo.loss.clip=ppo, dual or cispo",
    ),
    Rule(keys=("algo.loss.dual_clip",), unless={"algo.loss.clip": ("dual",)}, advice="Set algo.loss.clip=dual"),
    Rule(
        keys=("algo.loss.clip_ratio_low", "algo.loss.clip_ratio_high", "algo.loss.dual_clip"),
        when=RATIO_IS_1,
        advice=SEVERAL_UPDATES,
    ),
    Rule(keys=("algo.loss.clip",), values=("dual", "cispo"), when=RATIO_IS_1, advice=SEVERAL_UPDATES),
    Rule(keys=("algo.loss.ratio_level",), values=("sequence",), when=RATIO_IS_1, advice=SEVERAL_UPDATES),
    Rule(keys=("algo.loss.kl_estimator",), when={"algo.loss.kl_coef": (0,)}, advice="Set algo.loss.kl_coef above 0"),
    Rule(
        keys=("algo.loss.importance_cap",),
        when={"algo.loss.old_logprobs": ("rollout",)},
        advice="It caps the importance weight between engine and learner: set algo.loss.old_logprobs=learner",
    ),
    Rule(keys=("algo.max_refills",), when={"algo.dynamic_sampling": (False,)}, advice="Set algo.dynamic_sampling=true"),
    Rule(
        keys=("reward.timeout_s",),
        when={"reward.extra": ([],)},
        advice="It bounds your own functions: give reward.extra",
    ),
    Rule(
        keys=tuple(
            f"reward.slow.{name}"
            for name in ("names", "concurrency", "retries", "on_failure", "workers", "worker_cpus")
        ),
        when={"reward.extra": ([],)},
        advice="It is for your own functions, and rlmed's slow rewards have their own: give reward.extra",
    ),
    Rule(
        keys=("reward.slow.worker_cpus",), when={"reward.slow.workers": (0,)}, advice="Set reward.slow.workers above 0"
    ),
    Rule(
        keys=("reward.slow",),
        when={
            "reward.extra": ([],),
            "reward.judge.url": (None,),
            "reward.embedding.model": (None,),
            "reward.radeval.metric": (None,),
        },
        advice="It is for rewards that take time: give reward.extra, or set a reward such as reward.judge.url",
    ),
    Rule(
        keys=_keys("reward.embedding", EmbeddingConfig, but=("model",)),
        when={"reward.embedding.model": (None,)},
        advice="Set reward.embedding.model",
    ),
    Rule(
        keys=_keys("reward.radeval", RadEvalConfig, but=("metric",)),
        when={"reward.radeval.metric": (None,)},
        advice="Set reward.radeval.metric",
    ),
    Rule(
        keys=_keys("reward.judge", JudgeConfig, but=("url",)),
        when={"reward.judge.url": (None,)},
        advice="Set reward.judge.url",
    ),
    Rule(
        keys=("reward.iou.start", "reward.iou.end", "reward.iou.steps"),
        when={"reward.iou.kind": ("mean",)},
        advice="Set reward.iou.kind=threshold",
    ),
    # engines and processes
    Rule(keys=VLLM, when={"rollout.engine": ("native", "fake")}, advice="Set rollout=vllm (with cluster=ray)"),
    Rule(
        keys=("rollout.prefill_tokens",),
        when={"rollout.engine": ("vllm",)},
        advice="vLLM sizes its own steps: leave it out",
    ),
    Rule(keys=("rollout.on_push",), when={"algo.max_staleness": (0,)}, advice="Set algo.max_staleness above 0"),
    Rule(keys=RAY, when={"cluster.kind": ("local",)}, advice="Set cluster=ray"),
)

MAY_CHANGE = (
    *("name", "profile", "resume", "checkpoint", "preflight", "cluster", "reliability"),
    *("loggers", "logging"),
    *("eval.every", "eval.at_start", "eval.at_end", "eval.predictions", "eval.report_metrics"),
    *("data.download", "learner.gradient_checkpointing"),
    *(
        "reward.slow",
        *(f"reward.judge.{name}" for name in ("url", "timeout_s", "retries", "concurrency", "on_failure")),
        *(
            f"reward.{reward}.{name}"
            for reward in ("embedding", "radeval")
            for name in ("timeout_s", "retries", "on_failure")
        ),
    ),
)
"""Keys and sections that may change when a run resumes: they affect neither learning nor what is
compared.
"""


def may_change(key: str) -> bool:
    """Return whether a run may resume with another value of `key`."""
    return any(f"{key}.".startswith(f"{name}.") for name in MAY_CHANGE)


def reads(program: str, key: str, value: Any = None) -> bool:
    """Return whether `program` reads `key`, set to `value`, at least with some values of others."""
    return not any(program in rule.programs and rule.covers(key, value) and not rule.conditional for rule in RULES)
