"""Build pools and learners of the commands beside `rlmed.launch`.

Evaluation samples only; supervised fine-tuning learns from written completions and samples to
evaluate. Both run in this process or, with `cluster=ray`, in the same workers and ranks as
training.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from learner.distributed import Parallelism
from learner.learner import OnSkippedUpdate
from learner.supervised import SupervisedLearner
from rlmed.cluster.build import build_ray, load_policies
from rlmed.cluster.capacity import settle_local, settle_rank
from rlmed.cluster.engines import build_local_pool, build_policy, settle_model
from rlmed.core.config.schema import ModelConfig, RunConfig
from rlmed.core.protocols import RolloutPool
from rlmed.data.prompts import PromptRenderer
from rlmed.models.loading import model_folder
from rlmed.models.policy import Policy

if TYPE_CHECKING:
    from learner.actor import RayLearner


@dataclass(frozen=True, slots=True)
class Sampling:
    """What an evaluation samples from."""

    pool: RolloutPool
    model: ModelConfig
    """Model settings as decided for all processes."""
    policy: Policy | None
    """The policy in this process; None with Ray."""
    resources: ExitStack
    """Released by the caller at the end."""


@dataclass(frozen=True, slots=True)
class Finetuning:
    """What supervised fine-tuning drives."""

    learner: SupervisedLearner | RayLearner
    pool: RolloutPool
    """Samples from the weights last pushed, in evaluations."""
    model: ModelConfig
    """Model settings as decided for all processes."""
    resources: ExitStack
    """Released by the caller at the end."""


BuildSampling = Callable[[RunConfig, PromptRenderer], Sampling]
"""Builds what samples from `config.model`: `build_sampling` or `build_local_sampling`."""


def build_sampling(config: RunConfig, renderer: PromptRenderer) -> Sampling:
    """Build what samples from `config.model`.

    Raises:
        ValueError: if Ray is requested but not installed.
        ConnectionError: if no Ray cluster answers at `config.cluster.address`.
    """
    if config.cluster.kind == "ray":
        debug = dataclasses.replace(config.debug, learn=False)
        cluster = build_ray(dataclasses.replace(config, debug=debug), None, None, _unreported, written=0)
        return Sampling(cluster.evaluation_pool, cluster.model, None, cluster.resources)
    return build_local_sampling(config, renderer)


def build_local_sampling(config: RunConfig, renderer: PromptRenderer) -> Sampling:
    """Build what samples from `config.model` in this process."""
    model = settle_model(config.model, engines=1)
    settle_local(dataclasses.replace(config, model=model), engines=1, learns=False, written=0)
    policy = build_policy(model, model_folder(model.path), threads=config.cluster.threads)
    return Sampling(build_local_pool(config.rollout, policy, renderer), model, policy, ExitStack())


def build_finetuning(
    config: RunConfig, renderer: PromptRenderer, folder: Path, *, checkpoint: Path | None, steps: int, longest: int
) -> Finetuning:
    """Build the learner of `steps` batches of written completions, and a pool.

    The `longest` completion has so many tokens.

    Raises:
        ValueError: if Ray is requested but not installed.
        ConnectionError: if no Ray cluster answers at `config.cluster.address`.
    """
    if checkpoint is None:  # resume=auto may have found nothing
        config = dataclasses.replace(config, resume=None)
    if config.cluster.kind == "ray":
        resumed, build = (
            folder if checkpoint else None,
            functools.partial(build_supervised, steps=steps, longest=longest),
        )
        # nothing would wake the engines between two evaluations
        rollout = dataclasses.replace(config.rollout, sleep=False)
        cluster = build_ray(
            dataclasses.replace(config, rollout=rollout), resumed, checkpoint, _unreported, build, written=longest
        )
        from learner.actor import RayLearner

        assert isinstance(cluster.learner, RayLearner)
        return Finetuning(cluster.learner, cluster.evaluation_pool, cluster.model, cluster.resources)
    model = settle_model(config.model, engines=1, resumed=folder if checkpoint else None)
    config = settle_local(dataclasses.replace(config, model=model), engines=1, learns=True, written=longest)
    trained, policy = load_policies(config, checkpoint, samples=True)
    learner = SupervisedLearner(trained, config.learner, total_steps=steps)
    return Finetuning(learner, build_local_pool(config.rollout, policy, renderer), model, ExitStack())


def build_supervised(
    config: RunConfig,
    on_bad_step: OnSkippedUpdate,
    parallelism: Parallelism | None = None,
    *,
    checkpoint: Path | None = None,
    steps: int,
    longest: int,
) -> SupervisedLearner:
    """Build one rank's learner of written completions; its metrics count skipped steps."""
    config = settle_rank(config, parallelism, written=longest)
    policy, _ = load_policies(config, checkpoint, samples=False)
    return SupervisedLearner(policy, config.learner, total_steps=steps, parallelism=parallelism)


def _unreported(batch: Sequence[object], reason: str) -> None:
    """Drop the report of a skipped batch: the metrics count it."""
