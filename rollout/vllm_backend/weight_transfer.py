"""Direct transfer by vLLM's weight-transfer API: NCCL or CUDA IPC; see `rlmed.core.weights`.

The learner's half, `WeightTransferSender`, runs in learner rank 0's process. vLLM drives the
exchange; this adds what it lacks: NCCL ranks for several engines, and what
`rlmed.models.sender` does for all transports.

The engine's half, `WeightTransfer`, runs in every worker process of vLLM, which imports this module
through `WorkerExtension`. It also accepts tensors passed in a call: a replacement worker fetches
the weights while the learner works.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferEngineFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.utils.network_utils import get_open_port

from rlmed.core.weights import IPC, EngineHandle
from rlmed.models.sender import Engines, WeightSender
from rlmed.models.weights import BUCKET_BYTES, gpu_name

BACKEND = "rlmed"

# It warns about every layer without weights in a push, rotary embeddings included; the engine knows
# what is really missing. A filter, since vLLM resets its loggers' levels whenever an engine starts.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(
    lambda record: record.levelno >= logging.ERROR
)


def check_group(connection: Any) -> None:
    """Check that an NCCL connection (of either side) can send.

    Raises:
        RuntimeError: if the NCCL library was not found; vLLM's calls then do nothing.
    """
    if isinstance(connection, NCCLWeightTransferEngine | NCCLTrainerWeightTransferEngine):
        group = connection.model_update_group
        if group is None or group.disabled:
            raise RuntimeError("NCCL does not load here; vLLM looks for it beside torch, or at VLLM_NCCL_SO_PATH")


# The learner's half.


class OneRankIpc(IPCTrainerWeightTransferEngine):
    """vLLM's IPC engine for a learner whose rank 0 alone shares a GPU; vLLM's own asks all."""

    def _all_gather_and_merge_handles(
        self, handles: list[dict[str, tuple[Any, ...]]]
    ) -> list[dict[str, tuple[Any, ...]]]:
        return handles

    @staticmethod
    def _post_send_sync() -> None:
        torch.cuda.ipc_collect()


def init_info(transport: str, engines: Sequence[EngineHandle], host: str, largest: int) -> TrainerInitInfo:
    """Return vLLM's settings for a transfer in chunks of bounded size.

    NCCL's ranks meet at `host`, each time at a new port. The memory shared by IPC must hold the
    `largest` parameter (bytes).
    """
    if transport == IPC:
        return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=max(BUCKET_BYTES, largest))
    return NCCLTrainerInitInfo(
        rank=0,
        master_address=host,
        master_port=get_open_port(),
        world_size=1 + sum(len(engine.devices) for engine in engines),
        packed=True,
        packed_buffer_size_bytes=BUCKET_BYTES,
    )


class EngineClients:
    """vLLM's `VLLMWeightSyncClient` for several engines: each call asks all and waits for all."""

    def __init__(self, transport: str, engines: Engines) -> None:
        """Call `engines`."""
        self._transport, self._engines = transport, engines
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect all engines; an engine's NCCL ranks follow those of the previous engine."""
        each, rank = [], init_info.get("rank_offset", 0)
        for engine in self._engines.handles:
            own = {"rank_offset": rank} if "rank_offset" in init_info else {}
            each.append((self._transport, init_info | own))
            rank += len(engine.devices)
        self._engines.start("connect", "connect", each)
        self._engines.wait()

    def start_weight_update(self) -> None:
        """Hold all engines."""
        self._engines.run("stop for new weights", "begin_update")

    def update_weights(self, update_info: Any) -> None:
        """Have all engines receive while the learner sends."""
        self._engines.run("receive weights", "receive", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Resume all engines under the new weights."""
        self._engines.run("take the new weights", "finish_update", self.version)


class WeightTransferSender(WeightSender, WeightSource):
    """Sends by vLLM's trainer engines, whose source of weights it is, too."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        device: torch.device,
        limit_s: float,
    ) -> None:
        """See `WeightSender`; `shapes` are dtype and full shape of each weight, in their order."""
        super().__init__(weights, device, limit_s)
        self._shapes = shapes
        self._round: Iterator[tuple[str, Tensor]] = iter(())

    def metadata(self) -> list[ParamMeta]:
        """See `WeightSource`."""
        return [ParamMeta(name, dtype, shape) for name, (dtype, shape) in self._shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Return the weights of this `send`; vLLM iterates once in each."""
        return self._round

    def _open(
        self, transport: str, engines: Engines, host: str
    ) -> tuple[TrainerWeightTransferEngine[Any], EngineClients]:
        largest = max(dtype.itemsize * math.prod(shape) for dtype, shape in self._shapes.values())
        trainer: type[TrainerWeightTransferEngine[Any]] = (
            OneRankIpc if transport == IPC else NCCLTrainerWeightTransferEngine
        )
        clients = EngineClients(transport, engines)
        engine = trainer.trainer_init(init_info(transport, engines.handles, host, largest), client=clients, source=self)
        check_group(engine)
        return engine, clients

    def _send(self, connection: Any, engines: Engines, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        engine, clients = connection
        clients.version, self._round = version, weights
        engine.send_weights()

    def _close(self, connection: Any) -> None:
        connection[0].shutdown()


# The engine's half.


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
    """Loads weights through vLLM's layerwise reload, which repeats the processing after loading."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    connection: WeightTransferEngine[Any, Any] | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to the learner, in place of any earlier connection.

        Raises:
            ValueError: for a backend or an info that vLLM does not know.
            RuntimeError: if NCCL does not load.
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
        """Load some weights.

        They are copied: an incomplete layer keeps them until the next call.
        """
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


def repack_projections(transfer: WeightTransfer) -> None:
    """Refresh the packed copies of vocabulary projections on a CPU.

    A projection tied to the embeddings receives no weights, so the layerwise reload leaves its copy
    stale.
    """
    if transfer.device.type == "cpu":
        for layer in transfer.model.modules():
            if isinstance(layer, VocabParallelEmbedding) and "cpu_linear" in vars(layer):
                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


class WorkerExtension:
    """Methods that vLLM adds to its workers; naming this class makes each import this module."""

    device: torch.device

    def gpu_name(self) -> str:
        """See `rlmed.models.weights.gpu_name`."""
        return gpu_name(self.device)


WeightTransferEngineFactory.register_engine(BACKEND, WeightTransfer)
