"""A user's own reward function: loaded by name, checked on every call."""

from __future__ import annotations

import importlib
import inspect

import numpy as np

from rewards.base import Reward
from rewards.deadline import DeadlineError, call_within
from rlmed.core.plugins import own_places, registered, search_own_code
from rlmed.core.spelling import closest
from rlmed.core.types import Completion, Example

ENTRY_POINTS = "rlmed.rewards"
"""Group of entry points by which installed packages offer rewards."""
_SHOWN = 200
"""Most characters of a completion that an error message shows."""


class RewardError(RuntimeError):
    """A user's reward function misbehaved; the message names function, example and completion."""


class RewardTimeoutError(RewardError):
    """A user's reward function took too long."""


def load_reward(path: str) -> Reward:
    """Import "module:function", or the function that an installed package registers by name.

    Modules in the working directory are found too, and beside the folder of `--config-dir`. Names
    are those of the entry points `rlmed.rewards`.

    Raises:
        ValueError: if the path, module or function is wrong; the message says which.
    """
    if ":" not in path and path.isidentifier():
        function = registered(ENTRY_POINTS, path, f"reward.extra has {path!r}", "module:function")
        if not callable(function):
            raise ValueError(f"reward.extra={path}: the entry point is not a function: correct its package")
        _check_arguments(path, function)
        return function  # type: ignore[no-any-return]
    module_name, colon, function_name = path.partition(":")
    if not (module_name and colon and function_name.isidentifier()) or module_name.endswith(".py"):
        raise ValueError(f"reward.extra has {path!r}: write module:function, for example my_rewards:few_words")
    search_own_code()
    try:
        module = importlib.import_module(module_name)
    except (
        Exception,
        SystemExit,
    ) as error:  # importing a user's module may raise anything
        raise ValueError(
            f"reward.extra={path}: module {module_name!r} cannot be imported from {own_places()} or the Python path: "
            f"{type(error).__name__}: {error}"
        ) from error
    function = vars(module).get(function_name)
    if not callable(function):
        what = "is not a function" if function_name in vars(module) else "does not exist"
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        near = closest(function_name, functions)
        advice = f"did you mean {near}?" if near else "define it there"
        raise ValueError(f"reward.extra={path}: {function_name!r} {what} in {module.__file__}: {advice}")
    _check_arguments(path, function)
    return function  # type: ignore[no-any-return]


def guarded(path: str, function: Reward, timeout_s: float) -> Reward:
    """Wrap a reward to fail with a `RewardError` if it raises, hangs, or returns no finite number.

    After one call that exceeds `timeout_s` seconds the function is never called again, so at most
    one thread hangs.
    """
    hung = False

    def reward(example: Example, completion: Completion) -> float:
        nonlocal hung
        where = f"reward {path} on example {example.id!r}, completion {_shorten(completion.text)}"
        if hung:
            raise RewardTimeoutError(f"{where}: not called, since an earlier call of it never returned")
        try:
            value: object = call_within(timeout_s, lambda: function(example, completion))
        except DeadlineError:
            hung = True
            raise RewardTimeoutError(
                f"{where}: no result after {timeout_s:g} s; make the function faster or raise reward.timeout_s"
            ) from None
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            raise RewardError(f"{where}: it raised {type(error).__name__}: {error}") from error
        return finite_number(value, where)

    return reward


def _check_arguments(path: str, function: Reward) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # C functions may have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"reward.extra={path}: it is called as f(example, completion), but is defined as f{signature} ({error})"
        ) from error


def finite_number(value: object, where: str) -> float:
    """Return what a reward function returned as a number.

    Raises:
        RewardError: for anything but a number that is finite in float32; begins with `where`.
    """
    if value is None:
        raise RewardError(f"{where}: it returned None; return a number at its end, for example 0.0")
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError("a string, even one that float() can parse")
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last for more than one element
        raise RewardError(f"{where}: it returned {_shorten(value)}, which is not a number") from None
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise RewardError(f"{where}: it returned {_shorten(value)}; return a finite number, for example 0.0")
    return number


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"
