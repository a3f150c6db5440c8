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
SPINS = "300000"
"""What libgomp does by itself: about a millisecond."""
LOOK_SECONDS = 0.1
"""How long the machine is watched; it counts in hundredths of a second."""
BUSY = 0.5
"""Cores that are missing, on average, for threads to sleep."""


def settle_waiting(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Let OpenMP's threads sleep while they wait, where others need their cores; before torch is loaded, or never.

    They spin by default, which is fastest alone. Beside another process a thread that spins keeps the one it waits for from
    its core: rollouts fall to a quarter. A variable that the user has set stays (benchmarks/busy_machine.py has figures).
    Either way one is set, so processes that this one starts follow its choice; they would see each other as the others.
    """
    if "torch" in sys.modules or any(name in environment for name in WAITING):
        return
    if usable_cores(root) > len(_own_cores()) - busy_cores(root) + BUSY:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        environment["GOMP_SPINCOUNT"] = SPINS


def settle_threads(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Give torch as many threads as the container's CPU quota has cores; before torch is loaded, or never.

    It knows affinity, and no quota: with a thread for each core of the host, all of them are halted as soon as the quota of a
    period is spent. A variable that the user has set stays.
    """
    if "torch" in sys.modules or any(name in environment for name in COUNTS):
        return
    cores = usable_cores(root)
    if cores < len(_own_cores()):
        environment["OMP_NUM_THREADS"] = str(cores)


def busy_cores(root: Path = Path("/")) -> float:
    """How many of the cores that this process may run on others use meanwhile; 0 where the system does not say.

    Other containers and virtual machines count too. Work on cores that this process may not run on does not.
    """
    before = _core_times(root)
    time.sleep(LOOK_SECONDS)
    after, busy = _core_times(root), 0.0
    for core in before.keys() & after.keys() & _own_cores():
        idle, passed = (now - then for now, then in zip(after[core], before[core], strict=True))
        if passed > 0:
            busy += min(max(1 - idle / passed, 0.0), 1.0)
    return busy


def _core_times(root: Path) -> dict[int, tuple[int, int]]:
    """Of each core: hundredths of a second without work, and in all, since the machine was started."""
    times = {}
    for line in _read(root / "proc/stat").splitlines():
        name, *fields = line.split()
        if name[3:].isdecimal() and name.startswith("cpu") and len(fields) >= 8:
            counts = [int(field) for field in fields[:8]]  # user nice system idle iowait irq softirq steal
            times[int(name[3:])] = (counts[3] + counts[4], sum(counts))
    return times


def usable_cores(root: Path = Path("/")) -> int:
    """Cores by affinity and by the container's CPU quota, whichever is fewer; at least 1.

    `root` is where /proc and /sys are looked for. A quota of a fraction of a core is rounded up.
    """
    cores, quota = len(_own_cores()), cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _own_cores() -> set[int]:
    """Numbers of the cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


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
