"""Learner side of vLLM's GPU weight transfer; runs in learner rank 0's process.

vLLM drives the exchange; this adds what it lacks: NCCL ranks for several engines, a timeout for every wait, and the name
of the engine that did not answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from typing import Any

import torch
from torch import Tensor

from rlmed.core.protocols import ClusterError
from rlmed.core.weights import NotConnectedError, Peer, TransferError
from rlmed.models.weights import BUCKET_BYTES
from rollout.vllm_backend.environment import import_vllm

import_vllm()

from vllm.distributed.weight_transfer import ParamMeta, TrainerWeightTransferEngine, WeightSource  # noqa: E402
from vllm.distributed.weight_transfer.base import TrainerInitInfo  # noqa: E402
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine  # noqa: E402
from vllm.distributed.weight_transfer.nccl_engine import (  # noqa: E402
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
)
from vllm.utils.network_utils import get_open_port  # noqa: E402

from rollout.vllm_backend.weight_transfer import check_group  # noqa: E402

ABORT_S = 30.0
"""Seconds in which a broken transfer must release its thread."""


class LearnerWeights(WeightSource):
    """Iterates over the policy's parameters, gathering each from all ranks when its turn comes."""

    def __init__(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], weights: Callable[[], Iterator[Any]]):
        """See `WeightTransferSender`."""
        self._shapes, self._weights = shapes, weights
        self._round: Iterator[tuple[str, Tensor]] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self._shapes.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest parameter."""
        return max(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self._shapes.values())

    def metadata(self) -> list[ParamMeta]:
        """See `WeightSource`."""
        return [ParamMeta(name, dtype, shape) for name, (dtype, shape) in self._shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSource`."""
        self._round = self._weights()
        return self._round

    def begin(self) -> None:
        """Start a new round."""
        self._round = None

    def exhaust(self) -> None:
        """Gather the rest of this round, since the other ranks do."""
        for _ in self if self._round is None else self._round:
            pass


class OneRankIpc(IPCTrainerWeightTransferEngine):
    """vLLM's IPC engine for a learner whose rank 0 alone shares a GPU; vLLM's exchanges memory handles between all ranks."""

    def _all_gather_and_merge_handles(self, handles: list[dict[str, tuple]]) -> list[dict[str, tuple]]:
        return handles

    @staticmethod
    def _post_send_sync() -> None:
        torch.cuda.ipc_collect()


ENGINES: dict[str, type[TrainerWeightTransferEngine]] = {"nccl": NCCLTrainerWeightTransferEngine, "ipc": OneRankIpc}


def init_info(transport: str, peers: Sequence[Peer], host: str, largest: int) -> TrainerInitInfo:
    """Return vLLM's settings for a transfer in chunks of bounded size.

    Args:
        transport: "nccl" or "ipc".
        peers: the engines.
        host: address of this machine, where NCCL's ranks meet, each time at a new port.
        largest: bytes of the largest parameter, which must fit into the memory shared by IPC.
    """
    if transport == "ipc":
        return IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=max(BUCKET_BYTES, largest))
    return NCCLTrainerInitInfo(
        rank=0,
        master_address=host,
        master_port=get_open_port(),
        world_size=1 + sum(len(peer.devices) for peer in peers),
        packed=True,
        packed_buffer_size_bytes=BUCKET_BYTES,
    )


class PeerClient:
    """vLLM's `VLLMWeightSyncClient` for several engines: each call goes to all of them and waits for all answers."""

    def __init__(self, transport: str, peers: Sequence[Peer], limit_s: float) -> None:
        """Call `peers`, each of which has `limit_s` seconds to answer."""
        self._transport, self._peers, self._limit_s = transport, peers, limit_s
        self.failed: Future[None] = Future()
        """Fails with an engine's first error: vLLM's own thread may hang in a call that the engine will never join."""
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect all engines; an engine's NCCL ranks follow those of the previous engine."""
        infos, rank = [], init_info.get("rank_offset")
        for peer in self._peers:
            infos.append(init_info if rank is None else {**init_info, "rank_offset": rank})
            rank = None if rank is None else rank + len(peer.devices)
        calls = [peer.connect(self._transport, info) for peer, info in zip(self._peers, infos, strict=True)]
        self._wait("connect", calls)

    def start_weight_update(self) -> None:
        """Hold all engines."""
        self._wait("stop for new weights", [peer.begin_update() for peer in self._peers])

    def update_weights(self, update_info: Any) -> None:
        """Have all engines receive while the learner sends."""
        self._wait("receive weights", [peer.receive(update_info) for peer in self._peers])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Resume all engines under the new weights."""
        self._wait("take the new weights", [peer.finish_update(self.version) for peer in self._peers])

    def _wait(self, action: str, calls: Sequence[Future[None]]) -> None:
        ended, waiting = wait(calls, self._limit_s, return_when=FIRST_EXCEPTION)
        for peer, call in zip(self._peers, calls, strict=True):
            if call in ended and (error := call.exception()) is not None:
                last_line = (str(error).strip().splitlines() or [repr(error)])[-1]
                self._fail(f"{peer.name} could not {action}: {last_line}", error)
        if waiting:
            silent = ", ".join(peer.name for peer, call in zip(self._peers, calls, strict=True) if call in waiting)
            self._fail(f"{silent} did not {action} within {self._limit_s:.0f} s", None)

    def _fail(self, message: str, cause: BaseException | None) -> None:
        error = RuntimeError(message)
        error.__cause__ = cause
        if not self.failed.done():
            self.failed.set_exception(error)
        raise error


class WeightTransferSender:
    """See `rlmed.core.weights.WeightSender`."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        device: torch.device,
        limit_s: float,
    ) -> None:
        """Send from this process.

        Args:
            shapes: dtype and full shape of each parameter, in the order of `weights`.
            weights: yields names and full tensors on `device`.
            device: a GPU.
            limit_s: timeout of connecting and of sending, in seconds.
        """
        self._source, self._device, self._limit_s = LearnerWeights(shapes, weights), device, limit_s
        self._engine: TrainerWeightTransferEngine | None = None
        self._client: PeerClient | None = None

    def connect(self, transport: str, peers: Sequence[Peer], host: str) -> None:
        """See `WeightSender.connect`."""
        self._disconnect()
        client = PeerClient(transport, peers, 0.9 * self._limit_s)  # shorter than ours, to name a silent engine first
        info = init_info(transport, peers, host, self._source.largest)

        def meet() -> TrainerWeightTransferEngine:
            return ENGINES[transport].trainer_init(info, client=client, source=self._source)

        try:
            engine = self._watch(meet, client)
            check_group(engine)
        except Exception as error:
            raise NotConnectedError(f"cannot connect learner and engines by {transport}: {error}") from error
        self._engine, self._client = engine, client

    def send(self, version: int) -> int:
        """See `WeightSender.send`."""
        engine, client = self._engine, self._client
        assert engine is not None, "connect first"
        assert client is not None, "connect first"
        client.version = version
        self._source.begin()
        try:
            self._watch(engine.send_weights, client)
        except Exception as error:
            self._disconnect()  # ends NCCL's calls, and so the thread
            self._let_go()
            raise TransferError(f"policy version {version} did not reach the engines: {error}") from error
        return self._source.bytes

    def _disconnect(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = self._client = None

    def _let_go(self) -> None:
        self._thread.join(ABORT_S)
        if self._thread.is_alive():
            raise ClusterError(
                "learner rank 0 hangs in a weight transfer that an engine did not finish. Resume from the last checkpoint "
                "with resume=auto"
            )
        self._source.exhaust()

    def _watch(self, work: Callable[[], Any], client: PeerClient) -> Any:
        """Run work that may never return in its own thread; an engine's error ends the wait."""
        result: Future[Any] = Future()

        def run() -> None:
            try:
                with torch.no_grad():
                    if self._device.type == "cuda":
                        torch.cuda.set_device(self._device)
                        torch.cuda.synchronize()  # vLLM copies on its own streams, which don't wait for the optimizer's
                    result.set_result(work())
            except BaseException as error:  # raised below, in the thread that waits
                result.set_exception(error)

        self._thread = threading.Thread(target=run, name="weight transfer", daemon=True)
        self._thread.start()
        wait([result, client.failed], self._limit_s, return_when=FIRST_COMPLETED)
        if client.failed.done():
            client.failed.result()
        if not result.done():
            raise TimeoutError(f"timed out after {self._limit_s:.0f} s (half of cluster.push_timeout_s)")
        return result.result()
