"""When learner rank 0 sends its weights to the engines itself, and whom it is connected with for that; the driver's side."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from learner.weight_publisher import OBJECT_STORE, choose_transport
from rlmed.core.weights import NotConnectedError, PushReport, Recipient, TransferError

log = logging.getLogger(__name__)


class DirectPush:
    """Connects with the engines that are there, anew whenever others are, and sends.

    NCCL has no groups that a member joins or leaves. So when a worker was replaced, all that are ready meet the learner
    again at the next push; until then the new one has fetched the weights from the store. Engines that could not be
    connected are not tried again before one of them has changed.
    """

    def __init__(
        self,
        setting: str,
        device: str,
        connect: Callable[[str, Sequence[Recipient]], None],
        send: Callable[[int], int],
    ) -> None:
        """Nothing is connected yet.

        Args:
            setting: `cluster.weight_transfer`.
            device: rank 0's GPU, see `rlmed.core.weights.Recipient.devices`.
            connect: lets rank 0 connect by a transport; raises NotConnectedError.
            send: lets all ranks send a version and returns the bytes; raises TransferError.
        """
        self._setting, self._device, self._connect, self._send = setting, device, connect, send
        self._connected: tuple[Any, ...] | None = None
        self._failed: tuple[Any, ...] | None = None
        self._thread = ThreadPoolExecutor(1, "direct push")

    def start(self, recipients: Sequence[Recipient], version: int) -> Future[PushReport] | None:
        """See `rlmed.core.weights.WeightOffer.send`.

        Raises:
            ConfigError: see `learner.weight_publisher.choose_transport`.
        """
        transport = choose_transport(self._setting, self._device, [entry.devices for entry in recipients])
        members = (transport, *(entry.address for entry in recipients))
        if transport == OBJECT_STORE or members == self._failed:
            return None
        return self._thread.submit(self._run, transport, recipients, members, version)

    def _run(
        self, transport: str, recipients: Sequence[Recipient], members: tuple[Any, ...], version: int
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
            log.info("weights go to %d engines by %s", len(recipients), transport)
        try:
            size = self._send(version)
        except TransferError as error:
            self._connected = None
            raise TransferError(_last_line(error)) from error
        return PushReport(size, 0.0, time.perf_counter() - start)


def _last_line(error: Exception) -> str:
    """Without the traceback that Ray puts before the message."""
    return str(error).strip().splitlines()[-1].rstrip(".")
