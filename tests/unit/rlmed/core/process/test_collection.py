"""Nothing is collected while libraries load, and everything as usual afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rlmed.core.process import collection
from rlmed.core.process.collection import put_off, resume
from tests.root import ROOT


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    """Thresholds and callbacks are left as they were."""
    thresholds, callbacks = gc.get_threshold(), list(gc.callbacks)
    yield thresholds
    resume()
    gc.unfreeze()
    assert (gc.get_threshold(), gc.callbacks) == (thresholds, callbacks)


def collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_nothing_is_collected_until_it_resumes(usual: tuple[int, int, int]) -> None:
    put_off()
    put_off()
    before = collections()
    loaded = [[number] for number in range(50_000)]
    assert collections() == before
    resume()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() >= len(loaded)
    _ = [[number] for number in range(50_000)]
    assert collections() > before


def test_it_resumes_by_itself_when_nobody_says_so(usual: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "OBJECTS", 10_000)
    put_off()
    _ = [[number] for number in range(50_000)]
    assert gc.get_threshold() == usual


@pytest.mark.parametrize("command", ["launch debug=fake_engine --cfg job", "report --help", "ask --help"])
def test_a_command_has_resumed_when_it_ends(command: str) -> None:
    module, *arguments = command.split()
    program = (
        "import atexit, gc, runpy, sys\n"
        f"atexit.register(lambda: print(gc.get_threshold() == {gc.get_threshold()}))\n"
        f"sys.argv = ['x', *{arguments}]\n"
        f"runpy.run_module('rlmed.{module}', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "True", done.stderr
