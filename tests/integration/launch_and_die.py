"""Starts a run that kills itself uncleanly at a place: `launch_and_die.py PLACE [override ...]`.

PLACE is one of: nowhere, rollout:N (at group N), backward:N (at gradient N), optimizer:N (at update
N), checkpoint:N (while writing the checkpoint of step N), metrics:N (before step N is written
down), report:1 (before the report is written), images:N (after the N-th file of generated rows),
reward:N (in the middle of the N-th line of the slow rewards' cache).
With wait:M,N it doesn't die but stands still before steps M and N are written down, each time until
somebody has removed the file `waits` that it makes in its folder; it notices a lost head of Ray
sooner than others do.
"""

from __future__ import annotations

from rlmed.core.process.starting import prepare_process

# before torch is imported; the script runs from any folder, where `tests` can't be imported
prepare_process()

# isort: split
# ruff: noqa: E402

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rlmed.data.phantom.studies
import rlmed.launch
import rlmed.report.terminal
from learner.learner import PolicyLearner
from learner.optimizer import Optimizer
from rewards.cache import RewardCache
from rlmed.commandline import run_command
from rlmed.recording.recorder import RunRecorder
from rollout.local import LocalPool

HEAD_SILENCE_S = 6.0


def die_at_call(owner: Any, name: str, number: int, *, after: bool) -> None:
    """Kill the process at the `number`-th call of `owner.name`, before or after its work."""
    original: Callable[..., Any] = vars(owner)[name]
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def die_in_checkpoint(step: int) -> None:
    """Kill the process when the weights of checkpoint `step` are written and its state is not.

    The run goes on meanwhile, until the next step is learnt from.
    """
    original = PolicyLearner.save

    def deadly(self: PolicyLearner, folder: Path) -> Callable[[], None]:
        write = original(self, folder)
        version = self.policy_version

        def write_and_die() -> None:
            write()
            while self.policy_version == version:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

        return write_and_die if f"{step:06d}" in folder.name else write

    PolicyLearner.save = deadly  # type: ignore[method-assign]


def die_in_reward(number: int) -> None:
    """Kill the process when half of the `number`-th line of rewards is written."""
    original, lines = RewardCache._append, 0

    def deadly(self: RewardCache, path: Path, line: bytes) -> None:
        nonlocal lines
        lines += 1
        if lines < number:
            original(self, path, line)
        elif lines == number:
            original(self, path, line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    RewardCache._append = deadly  # type: ignore[method-assign]


def wait_before(steps: set[int]) -> None:
    """Stand still in the main thread before these steps are written down; all else goes on."""
    original = RunRecorder.record_groups

    def waiting(self: RunRecorder, step: int, *args: Any, **kwargs: Any) -> None:
        if step in steps:
            sign = self._folder / "waits"
            sign.write_text("")
            while sign.exists():
                time.sleep(0.05)
        original(self, step, *args, **kwargs)

    RunRecorder.record_groups = waiting  # type: ignore[method-assign]


def notice_a_lost_head_soon() -> None:
    """Wait `HEAD_SILENCE_S` for an answer of Ray's head, not as long as users' runs do."""
    from rlmed.cluster import ray_session

    watch: Any = functools.partial(ray_session.HeadWatch, limit_s=HEAD_SILENCE_S)
    ray_session.HeadWatch = watch  # type: ignore[misc]


def main() -> None:
    place, _, number = sys.argv.pop(1).partition(":")
    match place:
        case "nowhere":
            pass
        case "rollout":
            die_at_call(LocalPool, "collect", int(number), after=True)
        case "backward":
            die_at_call(Optimizer, "accumulate", int(number), after=True)
        case "optimizer":
            die_at_call(Optimizer, "step", int(number), after=True)
        case "checkpoint":
            die_in_checkpoint(int(number))
        case "report":
            die_at_call(rlmed.report.terminal, "write_report", 1, after=False)
        case "images":
            die_at_call(rlmed.data.phantom.studies, "write_split", int(number), after=True)
        case "metrics":
            die_at_call(RunRecorder, "record_groups", int(number), after=False)
        case "reward":
            die_in_reward(int(number))
        case "wait":
            wait_before({int(step) for step in number.split(",")})
            notice_a_lost_head_soon()
        case _:
            raise SystemExit(f"unknown place {place!r}")
    run_command("train", rlmed.launch.main)


if __name__ == "__main__":
    main()
