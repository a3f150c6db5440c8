"""Choose a push's transport, and keep rank 0 connected with engines; see `rlmed.core.weights`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rlmed.core.config.checks import require
from rlmed.core.weights import (
    IPC,
    NCCL,
    OBJECT_STORE,
    EngineHandle,
    NotConnectedError,
    PushReport,
    TransferError,
    last_line,
)

log = logging.getLogger(__name__)

NEEDS = {
    IPC: "learner rank 0 and all vLLM engines on one GPU",
    NCCL: "a GPU for learner rank 0 and others, each used once, for vLLM engines",
}


def choose_transport(setting: str, learner: str, engines: Sequence[EngineHandle]) -> str:
    """Choose the transport from learner rank 0, on GPU `learner` ("" without one), to the engines.

    With `cluster.weight_transfer=auto`, "ipc" if all engines run on rank 0's GPU; "nccl" if none
    does and no two share a GPU, since an NCCL group may contain a GPU only once; else
    "object_store".

    Raises:
        ConfigError: if the setting names a transport that these devices do not allow.
    """
    devices = [device for engine in engines for device in engine.devices]
    known = bool(learner and devices) and all(engine.devices for engine in engines)
    allowed = {
        IPC: known and set(devices) == {learner},
        NCCL: known and len({learner, *devices}) == 1 + len(devices),
        OBJECT_STORE: True,
    }
    if setting == "auto":
        return next(transport for transport, fits in allowed.items() if fits)
    require(
        allowed[setting],
        f"cluster.weight_transfer={setting} needs {NEEDS.get(setting)}: rank 0 is on {learner or 'a CPU'}, the engines "
        f"are on {[list(engine.devices) for engine in engines]}. Use auto",
    )
    return setting


class DirectPush:
    """Sends weights to the ready engines, reconnecting whenever they have changed.

    No member can join or leave an NCCL group. So after a worker was replaced, all ready engines
    reconnect to the learner at the next push; until then the new one fetches weights from the
    store. After a failure to connect, the same engines are not tried again.
    """

    def __init__(
        self,
        setting: str,
        device: str,
        connect: Callable[[str, Sequence[EngineHandle]], Any],
        send: Callable[[int], Any],
    ) -> None:
        """Start unconnected; `connect` and `send` call rank 0's `WeightSender`, on GPU `device`."""
        self._setting, self._device, self._connect, self._send = setting, device, connect, send
        self._connected: tuple[Any, ...] = ()
        self._failed: tuple[Any, ...] = ()
        self._thread = ThreadPoolExecutor(1, "direct push")

    def start(self, version: int, engines: Sequence[EngineHandle]) -> Future[PushReport] | None:
        """See `rlmed.core.weights.WeightUpdate.send`.

        Raises:
            ConfigError: see `choose_transport`.
        """
        transport = choose_transport(self._setting, self._device, engines)
        members = (transport, *(engine.address for engine in engines))
        if transport == OBJECT_STORE or members == self._failed:
            return None
        return self._thread.submit(self._run, version, engines, transport, members)

    def _run(
        self, version: int, engines: Sequence[EngineHandle], transport: str, members: tuple[Any, ...]
    ) -> PushReport:
        start, connected, self._connected = time.perf_counter(), self._connected, ()
        try:
            if members != connected:
                self._connect(transport, engines)
                log.info("Sending weights to %d engines by %s", len(engines), transport)
            self._send(version)
        except NotConnectedError as error:
            self._failed = members
            raise NotConnectedError(last_line(error)) from error
        except TransferError as error:
            raise TransferError(last_line(error)) from error
        self._connected = members
        return PushReport(0.0, time.perf_counter() - start)
