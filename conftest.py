"""Read before every other conftest, some of which import transformers."""

from rlmed.core.process.torch_extensions import cure_torch_extensions

cure_torch_extensions()
