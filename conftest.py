"""Read before every other conftest, some of which import transformers."""

from rlmed.core.process.starting import prepare_process

prepare_process()
