"""Read before every other conftest, some of which import transformers."""

import os
import shutil
import tempfile

import pytest

from rlmed.core.process.starting import prepare_process

prepare_process()


def pytest_configure(config: pytest.Config) -> None:
    """Give all temporary files of the tests and of what they start one folder, removed at the end.

    Killed runs, vLLM and W&B leave theirs behind. Its name is short: Ray's sockets lie below it.
    """
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist has inherited it
    before = tempfile.gettempdir()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", before)  # where failed tests' own folders stay
    folder = tempfile.mkdtemp(prefix="t", dir=before)
    os.environ["TMPDIR"] = tempfile.tempdir = folder

    def leave() -> None:
        os.environ["TMPDIR"] = tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)

    config.add_cleanup(leave)
