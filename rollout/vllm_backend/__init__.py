"""vLLM as a rollout engine; the only package that imports it. The rest of rlmed runs where it is not installed."""
