"""Reinforcement learning that teaches small vision-language models to reason about radiology images."""

from rlmed.core.process.starting import watch_start
from rlmed.core.process.threads import settle_threads, settle_waiting

watch_start()
# before anything imports torch, which loads OpenMP
settle_threads()
settle_waiting()
