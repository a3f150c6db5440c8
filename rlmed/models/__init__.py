from rlmed.core.process.torch_extensions import cure_torch_extensions

cure_torch_extensions()  # before any module in here imports transformers
