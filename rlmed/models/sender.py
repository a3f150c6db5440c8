"""Learner rank 0's half of a direct push, whatever the transport: one deadline, failures by name.

A transport may never return from a call to an engine that has died, so it runs in a thread of its
own, which ends when its connection is closed. The engines are called meanwhile (`STAGES`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from typing import Any

import torch
from torch import Tensor

from rlmed.core.protocols import ClusterError
from rlmed.core.weights import CallEngine, EngineHandle, NotConnectedError, TransferError, last_line

ABORT_S = 30.0
"""Seconds in which a broken direct push must release its thread."""
CAUSE_S = 5.0
"""Seconds to learn who broke a transfer: its peers notice that before Ray reports its death."""


class Engines:
    """Calls to all engines of a connection at once."""

    def __init__(self, handles: Sequence[EngineHandle], call: CallEngine) -> None:
        """Call the engines of `handles` by `call`."""
        self.handles, self._call = handles, call
        self.failed: Future[None] = Future()
        """Fails with an engine's first error, or when rank 0 gives up; this ends every `wait`."""
        self._action, self._calls = "", list[Future[None]]()

    def start(self, action: str, stage: str, each: Sequence[tuple[Any, ...]]) -> None:
        """Start a stage with arguments for each engine; `action` says in messages what it does."""
        self._action = action
        self._calls = [self._call(engine, stage, *own) for engine, own in zip(self.handles, each, strict=True)]
        for call in self._calls:
            call.add_done_callback(lambda done: self.give_up(done.exception()))

    def wait(self) -> None:
        """Wait until all engines have completed the stage."""
        for call in self._calls:
            wait([call, self.failed], return_when=FIRST_COMPLETED)
            if self.failed.done():
                self.failed.result()
            call.result()

    def run(self, action: str, stage: str, *arguments: Any) -> None:
        """Start a stage with the same arguments for all engines, and wait."""
        self.start(action, stage, [arguments] * len(self.handles))
        self.wait()

    def give_up(self, error: BaseException | None) -> None:
        """End the waits because of an error, if there is one."""
        if error is not None:
            with contextlib.suppress(InvalidStateError):  # not the first one
                self.failed.set_exception(error)

    def explain(self, own: BaseException | None, patience_s: float) -> str:
        """Return which engines failed, or `own`, rank 0's error, and which are silent.

        An engine has `patience_s` to end: who notices a broken connection first did not break it.
        """
        ended, _ = wait(self._calls, patience_s)
        called = list(zip(self.handles, self._calls, strict=False))  # no calls before the first stage
        reasons = [
            f"{engine.name} could not {self._action}: {last_line(cause)}"
            for engine, call in called
            if call in ended and (cause := call.exception()) is not None
        ]
        if own is not None and not reasons:
            reasons = [last_line(own)]
        silent = ", ".join(engine.name for engine, call in called if call not in ended)
        return "; ".join(reasons + [f"{silent} did not {self._action}"] * bool(silent)) or "rank 0 did not finish"


class WeightSender(ABC):
    """Sends weights directly from learner rank 0 to engines; a transport opens, sends, closes."""

    def __init__(
        self, weights: Callable[[], Iterator[tuple[str, Tensor]]], device: torch.device, limit_s: float
    ) -> None:
        """Send what `weights` yields, names and full tensors on `device`.

        `limit_s` bounds connecting and each `send`, in seconds.
        """
        self._weights, self._device, self._limit_s = weights, device, limit_s
        self._engines: Engines
        self._connection: Any = None

    @abstractmethod
    def _open(self, transport: str, engines: Engines, host: str) -> Any:
        """Return a connection with the engines, which reach rank 0 at `host`."""

    @abstractmethod
    def _send(self, connection: Any, engines: Engines, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Send the weights, all stages included."""

    @abstractmethod
    def _close(self, connection: Any) -> None:
        """Close a connection, which ends a `_send` that hangs."""

    def connect(self, transport: str, engines: Sequence[EngineHandle], call: CallEngine, host: str) -> None:
        """Connect from address `host`, replacing old connections.

        Raises:
            NotConnectedError: if that fails; nothing was sent.
        """
        self._disconnect()
        self._engines = callees = Engines(engines, call)
        try:
            self._connection = self._watch(lambda: self._open(transport, callees, host))
        except Exception as error:
            raise NotConnectedError(f"cannot connect learner and engines by {transport}: {error}") from error

    def send(self, version: int) -> None:
        """Send the weights as `version`; other ranks gather them, too.

        Raises:
            TransferError: if an engine fails; connect again.
            ClusterError: if the transport cannot be ended.
        """
        connection, engines, weights = self._connection, self._engines, self._weights()
        assert connection is not None, "connect first"
        try:
            self._watch(lambda: self._send(connection, engines, weights, version))
        except Exception as error:
            self._disconnect()
            self._thread.join(ABORT_S)
            if self._thread.is_alive():
                raise ClusterError(
                    "learner rank 0 hangs in a weight transfer that an engine did not finish. Resume from the last "
                    "checkpoint with resume=auto"
                ) from error
            for _ in weights:  # or the other ranks would wait for this one to gather the rest
                pass
            raise TransferError(f"policy version {version} did not reach the engines: {error}") from error

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._close(self._connection)
        self._connection = None

    def _watch(self, work: Callable[[], Any]) -> Any:
        """Run work in its own thread; an engine's error or the deadline ends the wait for it."""
        result: Future[Any] = Future()

        def run() -> None:
            try:
                with torch.no_grad():
                    if self._device.type == "cuda":
                        torch.cuda.set_device(self._device)
                        torch.cuda.synchronize()  # a transport's own streams don't wait for the optimizer's
                    result.set_result(work())
            except BaseException as error:  # raised below, in the thread that waits
                result.set_exception(error)

        engines, end = self._engines, time.monotonic() + self._limit_s
        self._thread = threading.Thread(target=run, name="weight transfer", daemon=True)
        self._thread.start()
        ended, _ = wait([result, engines.failed], self._limit_s, return_when=FIRST_COMPLETED)
        if result in ended and result.exception() is None:
            return result.result()
        own = result.exception() if result in ended else None
        reason = engines.explain(own, max(0.0, min(CAUSE_S, end - time.monotonic())))
        within = "" if ended else f" within {self._limit_s:.0f} s (half of cluster.push_timeout_s)"
        error = RuntimeError(reason + within)
        engines.give_up(error)
        raise error from own
