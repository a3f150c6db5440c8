"""Control transformers' terminal output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


def silence_progress_bars() -> None:
    """Disable transformers' progress bars, such as for loading weights: rlmed has its own."""
    logging.disable_progress_bar()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Suppress transformers' table of missing and unexpected weights: our own error says it in one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
