"""The number of usable cores, from made-up cgroup files."""

from pathlib import Path

import pytest

from rlmed.core import threads

V2, V1 = "0::/a/b\n", "5:memory:/a\n4:cpu,cpuacct:/a\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        (V2, {}, None),
        (V2, {"a/b/cpu.max": "max 100000\n"}, None),
        (V2, {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"cpu.max": "200000 100000\n"}, 2.0),
        (V2, {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 1.0),
        ("0::/../x\n", {"x/cpu.max": "50000 100000\n"}, 0.5),
        (V1, {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("3:cpuset:/a\n", {"a/cpu.max": "100000 100000\n"}, None),
    ],
)
def test_quota(tmp_path: Path, groups: str, files: dict[str, str], quota: float | None) -> None:
    write(tmp_path, {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert threads.cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("limit", "cores"), [("max", 4), ("50000", 1), ("150000", 2), ("900000", 4)])
def test_usable_cores_is_the_fewer_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, cores: int
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 5, 7}, raising=False)
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{limit} 100000\n"})
    assert threads.usable_cores(tmp_path) == cores
