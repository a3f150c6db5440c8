"""vLLM rollout engine; only this package imports vLLM, and the rest of rlmed runs without it installed."""

from rlmed.core.process.torch_extensions import cure_torch_extensions

cure_torch_extensions()  # before any module in here imports transformers
