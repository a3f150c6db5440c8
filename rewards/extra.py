"""A user's own reward function: loaded by name, watched at every call."""

from __future__ import annotations

import importlib
import math
import os
import queue
import sys
import threading

from rewards.base import Reward
from rlmed.core.types import Completion, Example


class RewardError(RuntimeError):
    """A user's reward function misbehaved; the message names function, example and completion."""


def load_reward(path: str) -> Reward:
    """Import "module:function"; modules in the working directory are found.

    Raises:
        ValueError: naming what is wrong with the path, the module or the function.
    """
    module_name, colon, function_name = path.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"reward.extra has {path!r}: write module:function, for example my_rewards:brevity")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it is imported is about that module
        raise ValueError(
            f"reward.extra={path}: module {module_name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = vars(module).get(function_name)
    if not callable(function):
        raise ValueError(f"reward.extra={path}: {module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def guarded(path: str, function: Reward, timeout_s: float) -> Reward:
    """The same reward, stopped with a `RewardError` when it raises, hangs, or returns no finite number.

    The function runs in one thread of its own; a call that outlasts `timeout_s` seconds ends the run, so no more than one
    thread is ever left hanging.
    """
    calls: queue.SimpleQueue[tuple[Example, Completion]] = queue.SimpleQueue()
    results: queue.SimpleQueue[object] = queue.SimpleQueue()

    def serve() -> None:
        while True:
            example, completion = calls.get()
            try:
                results.put(function(example, completion))
            except Exception as error:  # carried over to the caller, who raises
                results.put(error)

    worker: list[threading.Thread] = []

    def reward(example: Example, completion: Completion) -> float:
        if not worker:
            worker.append(threading.Thread(target=serve, name=f"reward {path}", daemon=True))
            worker[0].start()
        calls.put((example, completion))
        where = f"reward {path} on example {example.id!r}, completion {completion.text[:200]!r}"
        try:
            value = results.get(timeout=timeout_s)
        except queue.Empty:
            raise RewardError(
                f"{where}: no result after {timeout_s:g} s; make the function faster or raise reward.timeout_s"
            ) from None
        if isinstance(value, Exception):
            raise RewardError(f"{where}: it raised {type(value).__name__}: {value}") from value
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise RewardError(f"{where}: it returned {value!r}, which is no number") from None
        if not math.isfinite(number):
            raise RewardError(f"{where}: it returned {number}; return a finite number, for example 0.0")
        return number

    return reward
