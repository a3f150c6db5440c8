"""Reinforcement learning that teaches small vision-language models to reason about radiology images."""

import sys

from rlmed.core.process.starting import start_command

if sys.argv[:1] == ["-m"]:  # its value while Python locates the module of `python -m rlmed.X`
    start_command()
