"""vLLM rollout engine; only this package imports vLLM, and rlmed runs without it."""
