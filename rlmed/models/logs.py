"""What transformers says on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


def silence_progress_bars() -> None:
    """Keep transformers from drawing progress bars, as when it loads weights: rlmed's own are enough."""
    logging.disable_progress_bar()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from printing a table of weights that are missing or too many: our own error says it in a line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
