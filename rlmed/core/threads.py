"""Cores and memory that this process may use, and how its threads wait. No torch here: OpenMP reads its settings with it."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user decides how OpenMP's threads wait for each other."""
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user decides how many threads torch has."""
LOOKS, LOOK_SECONDS = 10, 0.005
"""How often, and how far apart, the machine's running threads are counted."""
BUSY = 0.5
"""Running threads of others, on average, for which no core is left."""


def settle_waiting(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Let OpenMP's threads sleep while they wait, where others need their cores; before torch is loaded, or never.

    They spin by default, which is fastest alone. Beside another process a thread that spins keeps the one it waits for from
    its core: rollouts fall to a quarter. A variable that the user has set stays (benchmarks/busy_machine.py has figures).
    """
    if "torch" in sys.modules or any(name in environment for name in WAITING):
        return
    if others_running(root) + usable_cores(root) > (os.cpu_count() or 1) + BUSY:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def settle_threads(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Give torch as many threads as the container's CPU quota has cores; before torch is loaded, or never.

    It knows affinity, and no quota: with a thread for each core of the host, all of them are halted as soon as the quota of a
    period is spent. A variable that the user has set stays.
    """
    if "torch" in sys.modules or any(name in environment for name in COUNTS):
        return
    cores = usable_cores(root)
    if cores < _cores_by_affinity():
        environment["OMP_NUM_THREADS"] = str(cores)


def others_running(root: Path = Path("/")) -> float:
    """Running threads of the machine besides this one, on average over 50 ms; 0 where the system does not say."""
    counts = []
    for look in range(LOOKS):
        fields = _read(root / "proc/loadavg").split()
        if len(fields) < 4:
            return 0.0
        counts.append(int(fields[3].partition("/")[0]) - 1)
        if look < LOOKS - 1:
            time.sleep(LOOK_SECONDS)
    return max(0.0, sum(counts) / len(counts))


def usable_cores(root: Path = Path("/")) -> int:
    """Cores by affinity and by the container's CPU quota, whichever is fewer; at least 1.

    `root` is where /proc and /sys are looked for. A quota of a fraction of a core is rounded up.
    """
    cores, quota = _cores_by_affinity(), cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cores_by_affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The tightest CPU quota of the process's cgroup and those above it, in cores; None without a quota."""
    quotas = [(_quota_v2 if unified else _quota_v1)(group) for group, unified in _groups("cpu", root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """The tightest memory limit of the process's cgroup and those above it, in bytes; None without a limit."""
    said = [
        _read(group / ("memory.max" if unified else "memory.limit_in_bytes")).strip()
        for group, unified in _groups("memory", root)
    ]
    return min((int(limit) for limit in said if limit.isdecimal()), default=None)


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the process's cgroup and those above it, each with whether it is of version 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mounts, unified = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], True
        elif controller in controllers.split(","):
            mounts, unified = [f"sys/fs/cgroup/{controller}", f"sys/fs/cgroup/{controllers}"], False
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            # a group may not use more than any group above it
            for depth in range(len(parts) + 1):
                yield root.joinpath(mount, *parts[:depth]), unified


def _quota_v2(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").strip().partition(" ")
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip())


def _ratio(quota: str, period: str) -> float | None:
    """None for "max", -1 (no limit) and files that are missing."""
    if not (quota.isdecimal() and period.isdecimal()) or int(quota) == 0 or int(period) == 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
