"""vLLM rollout engine; only this package imports vLLM, which may be missing."""
