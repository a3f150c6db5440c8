"""vLLM as a rollout engine; the only package that imports it. The rest of rlmed runs where it is not installed."""

from rlmed.core.torch_extensions import cure_torch_extensions

cure_torch_extensions()  # before any module in here imports transformers
