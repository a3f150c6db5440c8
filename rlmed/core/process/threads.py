"""Cores and memory available to this process, and how its threads wait.

This module does not import torch: OpenMP reads its settings on import.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from rlmed.core.process.display import address_limit

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that set how OpenMP threads wait for each other."""
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that set torch's thread count."""
SPINS = "300000"
"""libgomp's default: about a millisecond."""
LOOK_SECONDS = 0.1
"""Sampling time of the machine's load, whose counters have a resolution of 10 ms."""
BUSY = 0.5
"""Average shortage of cores above which threads sleep."""


def settle_waiting(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Let waiting OpenMP threads sleep if other processes need cores; no-op once torch is loaded.

    They spin by default, which is fastest on an idle machine. Beside another process, a spinning
    thread keeps the one it waits for off its core: rollouts fall to a quarter of their speed. A
    variable set by the user wins (figures: benchmarks/busy_machine.py). A variable is set either
    way, so child processes inherit the choice; they would take each other for foreign load.
    """
    if "torch" in sys.modules or any(name in environment for name in WAITING):
        return
    if usable_cores(root) > len(_own_cores()) - busy_cores(root) + BUSY:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        environment["GOMP_SPINCOUNT"] = SPINS


def settle_threads(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Limit torch's threads to the container's CPU quota; no-op once torch is loaded.

    torch respects affinity but not quotas: with a thread per host core, all of them stall once a
    period's quota is spent. A variable set by the user wins.
    """
    if "torch" in sys.modules or any(name in environment for name in COUNTS):
        return
    cores = usable_cores(root)
    if cores < len(_own_cores()):
        environment["OMP_NUM_THREADS"] = str(cores)


def busy_cores(root: Path = Path("/")) -> float:
    """Return how many of this process's cores others are using; 0 if the system does not say.

    Other containers and virtual machines count too; work on cores outside this process's affinity
    does not.
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
    """Return, for each core, idle and total time since boot, in 10 ms."""
    times = {}
    for line in _read(root / "proc/stat").splitlines():
        name, *fields = line.split()
        if name[3:].isdecimal() and name.startswith("cpu") and len(fields) >= 8:
            # user nice system idle iowait irq softirq steal
            counts = [int(field) for field in fields[:8]]
            times[int(name[3:])] = (counts[3] + counts[4], sum(counts))
    return times


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of cores allowed by affinity and by the container's CPU quota, at least 1.

    /proc and /sys are read below `root`. A fractional quota is rounded up.
    """
    cores, quota = len(_own_cores()), cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _own_cores() -> set[int]:
    """Return the ids of the cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the tightest CPU quota of the process's cgroup and ancestors, in cores, or None."""
    quotas = [(_quota_v2 if unified else _quota_v1)(group) for group, unified in _groups("cpu", root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the tightest memory limit of the process's cgroup and ancestors, in bytes, or None."""
    said = [
        _read(group / ("memory.max" if unified else "memory.limit_in_bytes")).strip()
        for group, unified in _groups("memory", root)
    ]
    return min((int(limit) for limit in said if limit.isdecimal()), default=None)


def available_memory(root: Path = Path("/"), *, processes: int = 1) -> int | None:
    """Return the bytes that `processes` can still take; None if unknown.

    That is what machine and cgroups have left, of which a cgroup's file pages are given back before
    its limit counts, and what `ulimit -v` leaves to each, as to this one.
    """
    left = [
        int(line.split()[1]) * 1024
        for line in _read(root / "proc/meminfo").splitlines()
        if line.startswith("MemAvailable:")
    ]
    for group, unified in _groups("memory", root):
        limit = _read(group / ("memory.max" if unified else "memory.limit_in_bytes")).strip()
        used = _read(group / ("memory.current" if unified else "memory.usage_in_bytes")).strip()
        if limit.isdecimal() and used.isdecimal():
            counts = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            prefix = "" if unified else "total_"
            files = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            left.append(max(0, int(limit) - int(used) + files))
    own, size = address_limit(), _read(root / "proc/self/statm").split()
    if own is not None and size:
        left.append(processes * max(0, own - int(size[0]) * os.sysconf("SC_PAGE_SIZE")))
    return min(left, default=None)


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the process's cgroup and ancestors, each with whether it's cgroup v2."""
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
            # an ancestor's limit applies too
            for depth in range(len(parts) + 1):
                yield root.joinpath(mount, *parts[:depth]), unified


def _quota_v2(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").strip().partition(" ")
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip())


def _ratio(quota: str, period: str) -> float | None:
    """Return quota / period; None for "max", -1 (no limit) and missing files."""
    if not (quota.isdecimal() and period.isdecimal()) or int(quota) == 0 or int(period) == 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
