"""Read before every other conftest, some of which import transformers."""

from rlmed.core.torch_extensions import cure_torch_extensions

cure_torch_extensions()
