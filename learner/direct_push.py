"""Driver side of direct sends: decides when learner rank 0 sends weights itself, and manages its connection."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from learner.weight_publisher import OBJECT_STORE, choose_transport
from rlmed.core.weights import EngineHandle, NotConnectedError, PushReport, TransferError

log = logging.getLogger(__name__)


class DirectPush:
    """Sends weights to the ready engines, reconnecting whenever they have changed.

    No member can join or leave an NCCL group. So after a worker was replaced, all ready engines reconnect to the
    learner at the next push; until then the new one fetches weights from the store. After a failure to connect, the same
    engines are not tried again.
    """

    def __init__(
        self,
        setting: str,
        device: str,
        connect: Callable[[str, Sequence[EngineHandle]], None],
        send: Callable[[int], int],
    ) -> None:
        """Start unconnected.

        Args:
            setting: `cluster.weight_transfer`.
            device: rank 0's GPU, see `rlmed.core.weights.EngineHandle.devices`.
            connect: connects rank 0 by a transport; raises NotConnectedError.
            send: sends a version from all ranks and returns the bytes; raises TransferError.
        """
        self._setting, self._device, self._connect, self._send = setting, device, connect, send
        self._connected: tuple[Any, ...] | None = None
        self._failed: tuple[Any, ...] | None = None
        self._thread = ThreadPoolExecutor(1, "direct push")

    def start(self, recipients: Sequence[EngineHandle], version: int) -> Future[PushReport] | None:
        """See `rlmed.core.weights.WeightUpdate.send`.

        Raises:
            ConfigError: see `learner.weight_publisher.choose_transport`.
        """
        transport = choose_transport(self._setting, self._device, [entry.devices for entry in recipients])
        members = (transport, *(entry.address for entry in recipients))
        if transport == OBJECT_STORE or members == self._failed:
            return None
        return self._thread.submit(self._run, transport, recipients, members, version)

    def _run(
        self, transport: str, recipients: Sequence[EngineHandle], members: tuple[Any, ...], version: int
    ) -> PushReport:
        start = time.perf_counter()
        if members != self._connected:
            self._connected = None
            try:
                self._connect(transport, recipients)
            except NotConnectedError as error:
                self._failed = members
                raise NotConnectedError(_last_line(error)) from error
            self._connected = members
            log.info("Sending weights to %d engines by %s", len(recipients), transport)
        try:
            size = self._send(version)
        except TransferError as error:
            self._connected = None
            raise TransferError(_last_line(error)) from error
        return PushReport(size, 0.0, time.perf_counter() - start)


def _last_line(error: Exception) -> str:
    """Return the message without the traceback that Ray puts before it."""
    return str(error).strip().splitlines()[-1].rstrip(".")
