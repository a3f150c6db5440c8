"""Processes for the rewards that take time, with `cluster=ray`."""

from __future__ import annotations

import functools

from rewards.processes import Processes, RewardProcess
from rlmed.core.config.schema import RunConfig
from rlmed.tasks.registry import settle_tasks


def reward_processes(config: RunConfig) -> Processes | None:
    """Return the processes that `reward.slow.workers` asks for; None without any.

    They start with the first call, when Ray has been started.
    """
    slow = config.reward.slow
    if not slow.workers:
        return None
    # a reward may judge by a task of the user's
    prepare = functools.partial(settle_tasks, config.data.extra_tasks, config.data.synonyms)

    def start(number: int) -> RewardProcess:
        from rewards.actor import RayRewardProcess

        return RayRewardProcess(prepare, cpus=slow.worker_cpus)

    return Processes(start, slow.workers, start_s=config.cluster.start_timeout_s)
