"""Our backend of vLLM's weight-transfer API: tensors passed in a call, or vLLM's own GPU backends.

One engine must accept both: a replacement worker fetches the weights while the learner works.

vLLM imports this module in every worker process, through `WorkerExtension`, which registers the backend there too.
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

# It warns about every layer without weights in a push, rotary embeddings included; `update` knows what is really missing.
# A filter, since vLLM resets its loggers' levels whenever an engine starts.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(
    lambda record: record.levelno >= logging.ERROR
)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How the learner will send weights; needed for direct sends only."""

    transport: str
    """One of vLLM's own backends: "nccl" or "ipc"."""
    info: dict[str, Any]
    """Fields of that backend's init info."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Some of the new weights, as tensors or by a direct send."""

    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    """Names as in a checkpoint of the model, and CPU tensors that may change after the call."""
    direct: dict[str, Any] | None = None
    """Fields of the connected backend's update info."""


class WeightTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads weights through vLLM's layerwise reload, which also repeats the processing after loading."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """See `vllm.distributed.weight_transfer.WeightTransferEngine`."""
        super().__init__(*arguments, **keywords)
        self.connection: WeightTransferEngine[Any, Any] | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to the learner by one of vLLM's backends; replaces any earlier connection.

        Raises:
            ValueError: for a backend or an info that vLLM does not know.
            RuntimeError: if NCCL does not load; vLLM would then silently send nothing.
        """
        self.shutdown()
        connection = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=init_info.transport), self.vllm_config, self.device, self.model
        )
        connection.init_transfer_engine(connection.parse_init_info(init_info.info))
        check_group(connection)
        self.connection = connection

    def start_weight_update(self) -> None:
        """Prepare for weights; layers that receive none keep theirs."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load some weights. They are copied: an incomplete layer keeps them until the next call."""
        if update_info.direct is None:
            self.model.load_weights((name, tensor.to(self.device, copy=True)) for name, tensor in update_info.tensors)
        elif self.connection is None:
            raise RuntimeError("the learner sent weights without connecting first: a worker was started in between")
        else:
            self.connection.receive_weights(self.connection.parse_update_info(update_info.direct))

    def finish_weight_update(self) -> None:
        """Complete the update."""
        if self.connection is None:
            finalize_layerwise_reload(self.model, self.model_config)
        else:  # does the same and releases what it shares with the learner
            self.connection.finish_weight_update()
        repack_projections(self)

    def shutdown(self) -> None:
        """Close the connection, if any."""
        if self.connection is not None:
            self.connection.shutdown()
            self.connection = None


def check_group(connection: Any) -> None:
    """Check that an NCCL connection (of either side) can send.

    Raises:
        RuntimeError: if the NCCL library was not found; vLLM's calls then do nothing.
    """
    if isinstance(connection, NCCLWeightTransferEngine | NCCLTrainerWeightTransferEngine):
        group = connection.model_update_group
        if group is None or group.disabled:
            raise RuntimeError("NCCL does not load here; vLLM looks for it beside torch, or at VLLM_NCCL_SO_PATH")


def repack_projections(transfer: WeightTransfer) -> None:
    """Refresh the packed copies of vocabulary projections on a CPU.

    A projection tied to the embeddings receives no weights, so the layerwise reload leaves its copy stale.
    """
    if transfer.device.type == "cpu":
        for layer in transfer.model.modules():
            if isinstance(layer, VocabParallelEmbedding) and "cpu_linear" in vars(layer):
                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


class WorkerExtension:
    """Methods that vLLM adds to its workers; naming this class also makes each worker import this module."""

    device: torch.device

    def gpu_name(self) -> str:
        """See `rlmed.models.weights.gpu_name`."""
        return gpu_name(self.device)


WeightTransferEngineFactory.register_engine(BACKEND, WeightTransfer)
