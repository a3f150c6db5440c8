"""Reinforcement learning that teaches small vision-language models to reason about radiology images."""

from rlmed.core.threads import settle_threads, settle_waiting

# before anything imports torch, which loads OpenMP
settle_threads()
settle_waiting()
