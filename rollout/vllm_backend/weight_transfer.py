"""Our backend of vLLM's weight-transfer API: tensors that are handed over in a call, or vLLM's own backends for GPUs.

One engine has to take weights in both ways: a worker that replaces another fetches them while the learner learns.

Imported by vLLM in every worker process, through `WorkerExtension`, so that the backend is registered there too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine, NCCLWeightTransferEngine
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlmed.models.weights import gpu_name

BACKEND = "rlmed"

# It warns of every layer without weights in a push, rotary embeddings included; what is really missing, `update` knows.
# A filter, since vLLM sets the levels of its loggers again whenever an engine starts.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(
    lambda record: record.levelno >= logging.ERROR
)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How the learner will send weights; needed for direct ones only."""

    transport: str
    """One of vLLM's own backends: "nccl" or "ipc"."""
    info: dict[str, Any]
    """Fields of that backend's init info."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Some of the new weights, in one way or the other."""

    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    """Names as in a checkpoint of the model, and CPU tensors that may change after the call."""
    direct: dict[str, Any] | None = None
    """Fields of the update info of the backend that was connected."""


class WeightTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads weights through vLLM's layerwise reload, which also repeats what was made of the weights after loading."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """See `vllm.distributed.weight_transfer.WeightTransferEngine`."""
        super().__init__(*arguments, **keywords)
        self.connection: WeightTransferEngine[Any, Any] | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect with the learner by one of vLLM's backends, in place of any earlier connection.

        Raises:
            ValueError: for a backend or an info that vLLM does not know.
            RuntimeError: when NCCL does not load; vLLM would send nothing then, without a word.
        """
        self.shutdown()
        connection = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=init_info.transport), self.vllm_config, self.device, self.model
        )
        connection.init_transfer_engine(connection.parse_init_info(init_info.info))
        check_group(connection)
        self.connection = connection

    def start_weight_update(self) -> None:
        """Expect weights; layers that get none keep theirs."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load some weights. They are copied: a layer that is not complete yet waits for the next call with them."""
        if update_info.direct is None:
            self.model.load_weights((name, tensor.to(self.device, copy=True)) for name, tensor in update_info.tensors)
        elif self.connection is None:
            raise RuntimeError("the learner sends weights and has not connected before: a worker was started meanwhile")
        else:
            self.connection.receive_weights(self.connection.parse_update_info(update_info.direct))

    def finish_weight_update(self) -> None:
        """All weights are here."""
        if self.connection is None:
            finalize_layerwise_reload(self.model, self.model_config)
        else:  # it does the same, and lets go of what it shares with the learner
            self.connection.finish_weight_update()
        repack_projections(self)

    def shutdown(self) -> None:
        """End the connection, if there is one."""
        if self.connection is not None:
            self.connection.shutdown()
            self.connection = None


def check_group(connection: Any) -> None:
    """Make sure that NCCL, where a connection (of either side) is by NCCL, can send.

    Raises:
        RuntimeError: when the library was not found: vLLM's calls do nothing then.
    """
    if isinstance(connection, NCCLWeightTransferEngine | NCCLTrainerWeightTransferEngine):
        group = connection.model_update_group
        if group is None or group.disabled:
            raise RuntimeError("NCCL does not load here; vLLM looks for it beside torch, or at VLLM_NCCL_SO_PATH")


def repack_projections(transfer: WeightTransfer) -> None:
    """On a CPU, renew the packed copies of vocabulary projections.

    A projection that is tied to the embeddings gets no weights of its own, so the layerwise reload leaves its copy as it was.
    """
    if transfer.device.type == "cpu":
        for layer in transfer.model.modules():
            if isinstance(layer, VocabParallelEmbedding) and "cpu_linear" in vars(layer):
                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


class WorkerExtension:
    """vLLM adds these methods to its workers; naming it to vLLM also has this module imported in each of them."""

    device: torch.device

    def gpu_name(self) -> str:
        """See `rlmed.models.weights.gpu_name`."""
        return gpu_name(self.device)


WeightTransferEngineFactory.register_engine(BACKEND, WeightTransfer)
