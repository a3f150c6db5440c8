"""Ray wrapper around one reward process. No logic of its own.

Import it only where Ray is installed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from rewards.processes import serve
from rlmed.core.process.collection import resume


@ray.remote(num_cpus=0, max_restarts=0)
class RewardActor:
    """Process that calls reward functions."""

    def __init__(self, folder: str, prepare: Callable[[], object]) -> None:
        """Work in the driver's folder, if this machine has it, where its modules and files lie."""
        resume()  # its libraries have been loaded
        if Path(folder).is_dir():
            os.chdir(folder)
        prepare()

    def ready(self) -> str:
        """Return host and process id."""
        return f"{socket.gethostname()}, process {os.getpid()}"

    def call(self, path: str, batched: bool, sent: bytes) -> bytes:
        """See `rewards.processes.serve`."""
        return serve(path, batched, sent)


class RayRewardProcess:
    """A `rewards.processes.RewardProcess` that is a Ray actor."""

    def __init__(self, prepare: Callable[[], object], *, cpus: float) -> None:
        """Start an actor without waiting for it.

        Args:
            prepare: called in it before any reward.
            cpus: cores that it asks Ray for.
        """
        actor: Any = RewardActor  # type checkers see the class, not what `ray.remote` makes of it
        self._actor = actor.options(num_cpus=cpus).remote(os.getcwd(), prepare)
        self._ready: Future[str] = self._actor.ready.remote().future()

    def ready(self) -> Future[str]:
        """See `RewardProcess.ready`."""
        return self._ready

    def call(self, path: str, batched: bool, sent: bytes) -> Future[bytes]:
        """See `RewardProcess.call`."""
        return self._actor.call.remote(path, batched, sent).future()

    def kill(self) -> None:
        """See `RewardProcess.kill`."""
        ray.kill(self._actor)
