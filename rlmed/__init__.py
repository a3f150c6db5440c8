"""Reinforcement learning that teaches small vision-language models to reason about radiology images."""
