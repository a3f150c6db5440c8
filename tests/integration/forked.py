"""Commands in processes of their own, each forked from one process that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest

SECONDS = 300.0
FORKED = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True)
class Finished:
    """What came of a command."""

    returncode: int
    """Negative: the signal that killed it."""
    output: str
    """Both of its streams."""


def run_forked(main: Callable[[], object], arguments: Sequence[str], folder: Path) -> Finished:
    """Call `main()` with these command-line arguments in a process that works in `folder`.

    Args:
        main: a function that can be imported by its name.
        arguments: without the program's name.
        folder: of the working directory; the output is kept beside it.
    """
    with pytest.MonkeyPatch.context() as patch:  # the process that is forked from has one thread
        patch.setenv("OMP_NUM_THREADS", "1")
        FORKED.set_forkserver_preload(["tests.prepared", "rlmed.launch"])
        forkserver.ensure_running()
    log = folder.parent / f"{folder.name}.log"
    process = FORKED.Process(target=_command, args=(main, list(arguments), folder, log))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"not within {SECONDS} s: {log.read_text()}")
    return Finished(process.exitcode, log.read_text())


def _command(main: Callable[[], object], arguments: list[str], folder: Path, log: Path) -> None:
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    sys.argv[1:] = arguments
    main()
