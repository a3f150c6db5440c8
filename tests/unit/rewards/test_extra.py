"""A user's reward function: found by name; if it misbehaves, stopped with an error naming all."""

import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rewards.extra import RewardError, RewardTimeoutError, guarded, load_reward
from rlmed.core.types import Completion, Example

PATIENT = 600.0
"""A limit that no function here reaches, even where the machine stands still for a while."""
EXAMPLE = Example(id="mri-7", image=None, question="Which?", options=("head", "chest"), answer=1)
MODULE = """
def brevity(example, completion):
    return -len(completion.text)

def trl_style(completions, **kwargs):
    return [0.0]

def one(completion):
    return 0.0

number = 3
"""


def completion(text: str = "<think>x") -> Completion:
    return Completion(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32), text, "stop")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_a_module_in_the_working_directory_is_found(folder):
    (folder / "found_rewards.py").write_text(MODULE)
    assert load_reward("found_rewards:brevity")(EXAMPLE, completion("four")) == -4


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("broken", "write module:function"),
        ("broken:", "write module:function"),
        (":f", "write module:function"),
        ("broken.py:f", "write module:function"),
        ("usable:a.b", "write module:function"),
        ("absent:f", "'absent' cannot be imported from .*: ModuleNotFoundError: .*'absent'"),
        ("syntax:f", r"'syntax' cannot be imported.*SyntaxError.*syntax\.py, line 1"),
        ("raising:f", "'raising' cannot be imported.*ZeroDivisionError"),
        ("leaving:f", "'leaving' cannot be imported.*SystemExit: 3"),
        ("dependent:f", "No module named 'not_installed'"),
        ("usable:absent", r"'absent' does not exist in .*usable\.py"),
        ("usable:number", r"'number' is not a function .*usable\.py"),
        ("usable:trl_style", r"f\(example, completion\), .* as f\(completions, \*\*kwargs\)"),
        ("usable:one", r"f\(example, completion\), .* as f\(completion\)"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_that_says_why(folder, path, reason):
    files = {
        "usable": MODULE,
        "syntax": "def f(:\n",
        "raising": "1 / 0\n",
        "leaving": "raise SystemExit(3)\n",
        "dependent": "import not_installed\n",
    }
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content)
    with pytest.raises(ValueError, match=reason) as error:
        load_reward(path)
    assert path in str(error.value)


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.5), np.int64(2), np.array(0.5)])
def test_numbers_of_any_kind_pass(value):
    result = guarded("m:f", lambda example, completion: value, PATIENT)(EXAMPLE, completion())
    assert type(result) is float
    assert result == float(value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "returned None; return a number"),
        (float("nan"), "returned nan; .* finite number"),
        (float("-inf"), "it returned -inf"),
        (np.float32("nan"), "it returned .*nan"),
        (1e39, r"it returned 1e\+39"),  # infinite in float32
        (10**400, "which is not a number"),
        ("1.0", r"returned '1\.0', .*not a number"),
        ([1.0], r"returned \[1\.0\], .*not a number"),
        (1j, "returned 1j, .*not a number"),
        (np.array([0.5, 0.5]), "which is not a number"),
        ("x" * 9000, r"\(9002 characters\), .*not a number"),
    ],
)
def test_anything_else_is_an_error_that_names_everything(value, reason):
    with pytest.raises(RewardError, match=reason) as error:
        guarded("m:f", lambda example, completion: value, PATIENT)(EXAMPLE, completion("<think>hm"))
    assert str(error.value).startswith("reward m:f on example 'mri-7', completion '<think>hm': it returned ")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("raised", [KeyError("solution"), SystemExit(0), RecursionError("deep"), AssertionError()])
def test_a_function_that_raises_is_named_with_its_error(raised):
    def function(example: Example, completion: Completion) -> float:
        raise raised

    with pytest.raises(RewardError, match=rf"m:f .*'mri-7'.* raised {type(raised).__name__}") as error:
        guarded("m:f", function, PATIENT)(EXAMPLE, completion())
    assert error.value.__cause__ is raised


def test_a_long_completion_is_cut_in_the_message():
    with pytest.raises(RewardError, match=r"… \(10002 characters\): it returned None"):
        guarded("m:f", lambda example, completion: None, PATIENT)(EXAMPLE, completion("x" * 10_000))


def sleeps() -> None:
    time.sleep(60)


def spins() -> None:
    while True:
        pass


def waits() -> None:
    threading.Event().wait()


def backtracks() -> None:
    re.fullmatch(r"(a+)+b", "a" * 60)


def swallows() -> None:
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


@pytest.mark.parametrize("hang", [sleeps, spins, waits, backtracks, swallows])
def test_a_hang_is_an_error_and_the_function_is_stopped(hang):
    threads = set(threading.enumerate())
    reward = guarded("m:f", lambda example, completion: hang(), 0.1)
    with pytest.raises(RewardTimeoutError, match=r"m:f .*'mri-7'.*'<think>x'.*0\.1 s"):
        reward(EXAMPLE, completion())
    assert set(threading.enumerate()) <= threads


def test_outside_the_main_thread_a_hang_costs_one_thread_and_no_result_is_ever_late():
    released, calls, outcomes = threading.Event(), [], []

    def function(example: Example, completion: Completion) -> float:
        calls.append(completion.text)
        released.wait()
        return 111.0

    reward = guarded("m:f", function, 0.1)

    def run() -> None:
        for text in ("first", "second", "third"):
            try:
                outcomes.append(reward(EXAMPLE, completion(text)))
            except RewardTimeoutError as error:
                outcomes.append(str(error))

    before = set(threading.enumerate())
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(set(threading.enumerate()) - before) == 1
    released.set()
    assert calls == ["first"]
    assert "completion 'first': no result after 0.1 s" in outcomes[0]
    assert "completion 'second': not called, since an earlier call of it never returned" in outcomes[1]
    assert "completion 'third': not called" in outcomes[2]
