"""What transformers says on the terminal."""

from __future__ import annotations

from transformers.utils import logging


def silence_progress_bars() -> None:
    """Keep transformers from drawing progress bars, as when it loads weights: rlmed's own are enough."""
    logging.disable_progress_bar()
