"""Fixtures of the recorder's tests."""

from __future__ import annotations

from itertools import count

import pytest
from tensorboard.summary.writer import event_file_writer


class Counter:
    """Counts from 0."""

    def __init__(self) -> None:
        self._numbers = count()

    def get(self) -> int:
        return next(self._numbers)


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files of one second are read by their writers' numbers, as text: 10 before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", Counter())
