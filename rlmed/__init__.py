"""Reinforcement learning for small vision-language models that reason about radiology images."""
