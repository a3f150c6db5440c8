"""Transport `ipc`: rank 0 and all engines use one GPU, and share memory on it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

DEVICE = 6
"""Position of the GPU's number in what `reduce_tensor` returns; each process has its own."""


def open_shared(handle: Any, device: torch.device) -> Tensor:
    """Return another process's memory from what `reduce_tensor` returned there."""
    rebuild, arguments = handle
    if device.type == "cuda":
        arguments = (*arguments[:DEVICE], device.index or 0, *arguments[DEVICE + 1 :])
    memory: Tensor = rebuild(*arguments)
    return memory


class SharedMemory:
    """In place of a process group, and of the work that its `broadcast` returns."""

    def __init__(self, store: Store, rank: int, size: int, memory: Tensor) -> None:
        """Share `memory`, uint8 [bytes]; the store tells who has written and read it."""
        self._store, self._rank, self._readers, self._number = store, rank, size - 1, 0
        self._memory, self._values = memory, memory

    def broadcast(self, values: Tensor, root: int) -> SharedMemory:
        """Start to send the values of `root`, which is 0, to all others."""
        self._number, self._values = self._number + 1, values
        if self._rank == root:
            self._copy(self._memory[: len(values)], values)
            self._store.set(f"written {self._number}", "")
        return self

    def is_completed(self) -> bool:
        """Return True once all others have read, or `wait` can read."""
        if self._rank > 0:
            return self._store.check([f"written {self._number}"])
        return self._store.add(f"read {self._number}", 0) == self._readers

    def wait(self, timeout: timedelta) -> None:
        """Read what was written; never longer than that takes."""
        if self._rank > 0:
            self._copy(self._values, self._memory[: len(self._values)])
            self._store.add(f"read {self._number}", 1)

    def abort(self) -> None:
        """Give the memory back."""
        self._memory = self._values = torch.empty(0)
        if torch.cuda.is_initialized():
            torch.cuda.ipc_collect()

    @staticmethod
    def _copy(target: Tensor, source: Tensor) -> None:
        target.copy_(source)
        if target.is_cuda:  # another process reads or writes it next
            torch.cuda.synchronize(target.device)
