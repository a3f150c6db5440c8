"""vLLM rollout engine; only this package imports vLLM, and the rest of rlmed runs without it installed."""
