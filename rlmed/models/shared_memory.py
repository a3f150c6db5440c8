"""Transport `ipc`: rank 0 and all engines use one GPU, and share memory on it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.multiprocessing.reductions import reduce_tensor

DEVICE = 6
"""Position of the GPU's number in what `reduce_tensor` returns; each process has its own."""


class SharedMemory:
    """In place of a process group, and of the work that its `broadcast` returns."""

    def __init__(self, store: Store, rank: int, size: int, memory: Tensor) -> None:
        """Share `memory`, uint8 [bytes], with rank 0; a store tells who has written and read it."""
        self._store, self._rank, self._readers, self._number = store, rank, size - 1, 0
        self._memory: Tensor | None = memory

    def broadcast(self, values: Tensor, root: int) -> SharedMemory:
        """Send values of `root`, which may change once `is_completed`, or receive them."""
        assert self._memory is not None
        self._number += 1
        shared, written = self._memory[: len(values)], f"written {self._number}"
        if self._rank == root:
            _copy(shared, values)
            self._store.set(written, "")
        else:
            self._store.wait([written])
            _copy(values, shared)
            self._store.add(f"read {self._number}", 1)
        return self

    def is_completed(self) -> bool:
        """Return True if all others have read what `root` sent."""
        return self._store.add(f"read {self._number}", 0) == self._readers

    def wait(self, timeout: timedelta | None = None) -> None:
        """No-op: `broadcast` has waited."""

    def abort(self) -> None:
        """Give the memory back."""
        if self._memory is not None and self._memory.is_cuda:
            self._memory = None
            torch.cuda.ipc_collect()
        self._memory = None


def share(memory: Tensor) -> Any:
    """Return a handle that other processes, each once, can open."""
    return reduce_tensor(memory)


def open_shared(handle: Any, device: torch.device) -> Tensor:
    """Return another process's memory on `device`."""
    rebuild, arguments = handle
    if device.type == "cuda":
        arguments = (*arguments[:DEVICE], device.index or 0, *arguments[DEVICE + 1 :])
    opened: Tensor = rebuild(*arguments)
    return opened


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
    if target.is_cuda:  # another process reads or writes it next
        torch.cuda.synchronize(target.device)
