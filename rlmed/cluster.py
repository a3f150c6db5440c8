"""Where the parts run. `cluster=local` puts pool and learner into this process, on the same parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from learner.learner import PolicyLearner
from rlmed.core.config import RunConfig
from rlmed.core.protocols import Learner, RolloutPool
from rlmed.core.types import TrainGroup
from rlmed.data.prompts import PromptRenderer
from rlmed.memory import estimate, keep_freed_memory
from rlmed.models.policy import Policy, load_policy
from rlmed.setup import model_folder, resolve_device, resolve_dtype
from rollout.local import LocalPool
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cluster:
    """The two parts that the loop drives."""

    pool: RolloutPool
    learner: Learner
    evaluation_pool: RolloutPool
    """Samples from the same weights; training requests in flight are not disturbed by it."""

    def close(self) -> None:
        """Release what they hold."""
        self.pool.close()
        self.evaluation_pool.close()


def build_policy(config: RunConfig, folder: Path) -> Policy:
    """The policy in `folder` on the run's device and in its dtype."""
    if config.cluster.threads:
        torch.set_num_threads(config.cluster.threads)
    device = resolve_device(config.model)
    if device.type == "cpu":
        keep_freed_memory()
    return load_policy(folder, dtype=resolve_dtype(config.model), device=device)


def build_local_pool(config: RunConfig, policy: Policy, renderer: PromptRenderer) -> LocalPool:
    """A pool with the native engine on `policy`'s parameters."""
    limits = EngineLimits(
        max_completions=config.rollout.max_completions,
        max_prompt_tokens=config.data.max_prompt_tokens,
        prefill_tokens=config.rollout.prefill_tokens,
    )
    return LocalPool(NativeEngine(policy, renderer.decode, limits))


def build_cluster(
    config: RunConfig,
    renderer: PromptRenderer,
    *,
    checkpoint: Path | None,
    on_bad_step: Callable[[Sequence[TrainGroup], str], None],
) -> Cluster:
    """Pool and learner as `config.cluster` says.

    Args:
        config: the run.
        renderer: its tokenizer turns sampled ids into text.
        checkpoint: load the policy from there instead of `config.model`; the reference is always `config.model`.
        on_bad_step: told of batches that were skipped.
    """
    base = model_folder(config.model.path)
    policy = build_policy(config, checkpoint or base)
    reference = None
    if config.algo.kl_coef > 0:
        reference = build_policy(config, base)
        reference.model.requires_grad_(False)
    learner = PolicyLearner(
        policy,
        reference,
        config.algo,
        config.learner,
        total_steps=config.steps,
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
        on_bad_step=on_bad_step,
    )
    log.info("%s", estimate(policy, config).line())
    pool, evaluation_pool = (build_local_pool(config, policy, renderer) for _ in range(2))
    return Cluster(pool, learner, evaluation_pool)
