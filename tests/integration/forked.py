"""Commands in processes of their own, each forked from one process that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
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


class Forked:
    """A command that runs: `main()` with command-line arguments."""

    def __init__(
        self, main: Callable[[], object], arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        """Start it; the arguments are those of `run_forked`."""
        with pytest.MonkeyPatch.context() as patch:  # the process that is forked from has one thread
            patch.setenv("OMP_NUM_THREADS", "1")
            FORKED.set_forkserver_preload(["tests.prepared", "rlmed.launch", "rlmed.run"])
            forkserver.ensure_running()
        file, name = tempfile.mkstemp(prefix=f"{folder.name}-", suffix=".log", dir=folder.parent)
        os.close(file)
        self._log = Path(name)
        self._process = FORKED.Process(
            target=_command, args=(main, list(arguments), folder, self._log, dict(environment))
        )
        self._process.start()

    @property
    def output(self) -> str:
        """Both of its streams so far."""
        return self._log.read_text()

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that killed it."""
        return self._process.exitcode

    def kill(self) -> None:
        """Kill it and wait for its end."""
        self._process.kill()
        self._process.join()

    def finish(self) -> Finished:
        """Wait for its end."""
        self._process.join(SECONDS)
        if self._process.exitcode is None:
            self.kill()
            pytest.fail(f"not within {SECONDS} s: {self.output}")
        return Finished(self._process.exitcode, self.output)


def run_forked(
    main: Callable[[], object], arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> Finished:
    """Call `main()` with these command-line arguments in a process that works in `folder`.

    Args:
        main: a function that can be imported by its name.
        arguments: without the program's name.
        folder: of the working directory; the output is kept beside it.
        environment: variables of its own, which the processes that it starts inherit.
    """
    return Forked(main, arguments, folder, environment or {}).finish()


def _command(
    main: Callable[[], object], arguments: list[str], folder: Path, log: Path, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    tempfile.tempdir = None  # it may have been looked up before TMPDIR was set
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    sys.argv[1:] = arguments
    main()
