"""Our backend of vLLM's weight-transfer API: tensors that are handed over in a call.

Imported by vLLM in every worker process, through `WorkerExtension`, so that the backend is registered there too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "rlmed"

# It warns of every layer without weights in a push, rotary embeddings included; what is really missing, `update` knows.
# A filter, since vLLM sets the levels of its loggers again whenever an engine starts.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(
    lambda record: record.levelno >= logging.ERROR
)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Some of the new weights."""

    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    """Names as in a checkpoint of the model, and CPU tensors that may change after the call."""


class TensorWeightTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads tensors through vLLM's layerwise reload, which also repeats what was made of the weights after loading."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Expect weights; layers that get none keep theirs."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load some weights. They are copied: a layer that is not complete yet waits for the next call with them."""
        self.model.load_weights((name, tensor.to(self.device, copy=True)) for name, tensor in update_info.tensors)

    def finish_weight_update(self) -> None:
        """All weights are here."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_projections(self)

    def shutdown(self) -> None:
        """Nothing to release."""


def repack_projections(transfer: TensorWeightTransfer) -> None:
    """On a CPU, renew the packed copies of vocabulary projections.

    A projection that is tied to the embeddings gets no weights of its own, so the layerwise reload leaves its copy as it was.
    """
    if transfer.device.type == "cpu":
        for layer in transfer.model.modules():
            if isinstance(layer, VocabParallelEmbedding) and "cpu_linear" in vars(layer):
                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


class WorkerExtension:
    """Named to vLLM as extension of its workers for the sake of the import of this module alone."""


WeightTransferEngineFactory.register_engine(BACKEND, TensorWeightTransfer)
