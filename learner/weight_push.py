"""Choose how new weights go to the engines; see `rlmed.core.weights`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rlmed.core.config.checks import require
from rlmed.core.weights import IPC, NCCL, OBJECT_STORE, EngineHandle, PushReport, TransferError, last_line

log = logging.getLogger(__name__)

NEEDS = {
    IPC: "learner rank 0 and all engines on one GPU",
    NCCL: "a GPU for learner rank 0 and others, each used once, for the engines",
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
    """Sends weights to the ready engines; after a failure they fetch them until one has changed."""

    def __init__(self, setting: str, device: str, send: Callable[[str, Sequence[EngineHandle]], Any]) -> None:
        """Send by `send`, which calls all learner ranks; rank 0 is on GPU `device`."""
        self._setting, self._device, self._send = setting, device, send
        self._members: tuple[Any, ...] = ()
        self._works = True
        self._thread = ThreadPoolExecutor(1, "direct push")

    def start(self, engines: Sequence[EngineHandle]) -> Future[PushReport | None] | None:
        """See `rlmed.core.weights.WeightUpdate.send`.

        Raises:
            ConfigError: see `choose_transport`.
        """
        transport = choose_transport(self._setting, self._device, engines)
        members = (transport, *(engine.address for engine in engines))
        if members != self._members:
            log.info("Sending weights to %d engines by %s", len(engines), transport)
            self._members, self._works = members, transport != OBJECT_STORE
        return self._thread.submit(self._run, transport, engines) if self._works else None

    def _run(self, transport: str, engines: Sequence[EngineHandle]) -> PushReport | None:
        start = time.perf_counter()
        try:
            self._send(transport, engines)
        except TransferError as error:
            self._works = False
            log.warning("%s. Sending weights through the object store until a worker has changed", last_line(error))
            return None
        return PushReport(0.0, time.perf_counter() - start)
