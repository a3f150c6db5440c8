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


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        (V2, {"a/b/memory.max": "max\n"}, None),
        (V2, {"a/b/memory.max": "4000\n", "a/memory.max": "3000\n"}, 3000),
        ("5:memory:/a\n", {"memory/a/memory.limit_in_bytes": "2000\n"}, 2000),
        ("5:memory:/a\n", {"a/memory.max": "2000\n"}, None),
    ],
)
def test_memory_limit(tmp_path: Path, groups: str, files: dict[str, str], limit: int | None) -> None:
    write(tmp_path, {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert threads.memory_limit(tmp_path) == limit


@pytest.mark.parametrize(("limit", "cores"), [("max", 4), ("50000", 1), ("150000", 2), ("900000", 4)])
def test_usable_cores_is_the_fewer_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, cores: int
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 5, 7}, raising=False)
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{limit} 100000\n"})
    assert threads.usable_cores(tmp_path) == cores


def machine(root: Path, running: int) -> Path:
    write(root, {"proc/loadavg": f"0.10 0.20 0.30 {running}/345 6789\n"})
    return root


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.delitem(threads.sys.modules, "torch", raising=False)


@pytest.mark.parametrize(("running", "set_to"), [(1, None), (2, "PASSIVE"), (5, "PASSIVE"), (0, None)])
def test_threads_sleep_where_others_need_their_cores(
    tmp_path: Path, four_cores: None, running: int, set_to: str | None
) -> None:
    environment: dict[str, str] = {}
    threads.settle_waiting(environment, machine(tmp_path, running))
    assert environment.get("OMP_WAIT_POLICY") == set_to


def test_cores_that_are_left_to_others_are_theirs(tmp_path: Path, four_cores: None) -> None:
    environment: dict[str, str] = {}
    write(tmp_path, {"proc/self/cgroup": V2, "sys/fs/cgroup/a/cpu.max": "200000 100000\n"})
    threads.settle_waiting(environment, machine(tmp_path, 3))  # two others on the two cores that the quota leaves free
    assert environment == {}
    threads.settle_waiting(environment, machine(tmp_path, 4))
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("quota", "set_to"),
    [(None, None), ("max", None), ("400000", None), ("350000", None), ("150000", "2"), ("50000", "1")],
)
@pytest.mark.parametrize("version", [1, 2])
def test_torch_has_the_threads_that_the_quota_allows(
    tmp_path: Path, four_cores: None, version: int, quota: str | None, set_to: str | None
) -> None:
    environment: dict[str, str] = {}
    if version == 2:
        write(
            tmp_path, {"proc/self/cgroup": V2} | ({"sys/fs/cgroup/a/b/cpu.max": f"{quota} 100000\n"} if quota else {})
        )
    else:
        files = {"quota_us": f"{-1 if quota == 'max' else quota}\n", "period_us": "100000\n"} if quota else {}
        write(tmp_path, {"proc/self/cgroup": V1})
        write(tmp_path, {f"sys/fs/cgroup/cpu/a/cpu.cfs_{name}": text for name, text in files.items()})
    threads.settle_threads(environment, tmp_path)
    assert environment.get("OMP_NUM_THREADS") == set_to


@pytest.mark.parametrize("name", threads.COUNTS)
def test_the_users_number_of_threads_stays(tmp_path: Path, four_cores: None, name: str) -> None:
    environment = {name: "3"}
    write(tmp_path, {"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "100000 100000\n"})
    threads.settle_threads(environment, tmp_path)
    assert environment == {name: "3"}


def test_after_torch_the_threads_stay(tmp_path: Path, four_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(threads.sys.modules, "torch", threads)
    environment: dict[str, str] = {}
    write(tmp_path, {"proc/self/cgroup": V2, "sys/fs/cgroup/cpu.max": "100000 100000\n"})
    threads.settle_threads(environment, tmp_path)
    assert environment == {}


@pytest.mark.parametrize("name", threads.WAITING)
def test_what_the_user_has_set_stays(tmp_path: Path, four_cores: None, name: str) -> None:
    environment = {name: "7"}
    threads.settle_waiting(environment, machine(tmp_path, 9))
    assert environment == {name: "7"}


def test_after_torch_it_is_too_late(tmp_path: Path, four_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(threads.sys.modules, "torch", threads)
    environment: dict[str, str] = {}
    threads.settle_waiting(environment, machine(tmp_path, 9))
    assert environment == {}


@pytest.mark.parametrize("text", [None, "", "0.1 0.2"])
def test_a_system_that_does_not_say_is_taken_for_quiet(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        write(tmp_path, {"proc/loadavg": text})
    assert threads.others_running(tmp_path) == 0
