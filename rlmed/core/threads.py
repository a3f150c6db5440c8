"""Cores: how many this process may use, and how its threads wait. Imports no torch: OpenMP reads its settings with it."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import MutableMapping
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
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mounts, quota_of = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, quota_of = ["sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"], _quota_v1
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            # a group may not use more than any group above it
            quotas += [quota_of(root.joinpath(mount, *parts[:depth])) for depth in range(len(parts) + 1)]
    return min((quota for quota in quotas if quota is not None), default=None)


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
