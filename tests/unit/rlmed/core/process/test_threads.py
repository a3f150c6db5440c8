"""The number of usable cores, from made-up cgroup files."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlmed.core.process import threads

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


Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """`machine(1.0, 0.25)`: the root of two cores, the second idle three quarters of the time."""

    def make(*busy: float, ticks: int = 20) -> Path:
        def stat(passed: int) -> dict[str, str]:
            lines = [f"cpu{n} {700 + round(share * passed)} 5 3 {900 + passed - round(share * passed)} 7 0 1 2 0 0\n"
                     for n, share in enumerate(busy)]  # fmt: skip
            return {"proc/stat": f"cpu  1 2 3 4 5 6 7 8 0 0\n{''.join(lines)}intr 1 2 3\nctxt 4\n"}

        write(tmp_path, stat(0))
        monkeypatch.setattr(threads.time, "sleep", lambda _: write(tmp_path, stat(ticks)))
        return tmp_path

    return make


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.delitem(threads.sys.modules, "torch", raising=False)


SPIN, SLEEP = {"GOMP_SPINCOUNT": threads.SPINS}, {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("busy", "settled"),
    [
        ((0, 0, 0, 0), SPIN),
        ((0.1, 0.1, 0.1, 0.1), SPIN),
        ((1, 0, 0, 0), SLEEP),
        ((1, 1, 1, 1), SLEEP),
        ((0.25, 0.25, 0.25, 0.25), SLEEP),
        # cores on which this process does not run may be as busy as they like
        ((0, 0, 0, 0, 1, 1, 1, 1), SPIN),
        ((0, 0, 1, 0, 1, 1, 0, 0), SLEEP),
    ],
)
def test_threads_sleep_where_others_need_their_cores(
    machine: Machine, four_cores: None, busy: tuple[float, ...], settled: dict[str, str]
) -> None:
    environment: dict[str, str] = {}
    threads.settle_waiting(environment, machine(*busy))
    assert environment == settled


@pytest.mark.parametrize(
    ("own", "busy", "settled"),
    [
        ({2, 3}, (1, 1, 0, 0), SPIN),
        ({2, 3}, (0, 0, 1, 0), SLEEP),
        ({0, 7}, (0, 1, 1, 1, 1, 1, 1, 0), SPIN),
        ({0, 7}, (0, 0, 0, 0, 0, 0, 0, 1), SLEEP),
    ],
)
def test_the_cores_that_a_process_is_bound_to_are_looked_at(
    machine: Machine,
    four_cores: None,
    monkeypatch: pytest.MonkeyPatch,
    own: set[int],
    busy: tuple[float, ...],
    settled: dict[str, str],
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: own, raising=False)
    environment: dict[str, str] = {}
    threads.settle_waiting(environment, machine(*busy))
    assert environment == settled


@pytest.mark.parametrize(("busy", "settled"), [((1, 0, 1, 0), SPIN), ((1, 1, 0, 1), SLEEP)])
def test_cores_that_a_quota_leaves_to_others_are_theirs(
    tmp_path: Path, machine: Machine, four_cores: None, busy: tuple[float, ...], settled: dict[str, str]
) -> None:
    environment: dict[str, str] = {}
    write(tmp_path, {"proc/self/cgroup": V2, "sys/fs/cgroup/a/cpu.max": "200000 100000\n"})
    threads.settle_waiting(environment, machine(*busy))
    assert environment == settled


@pytest.mark.parametrize(("first", "then"), [((0, 0, 0, 0), (1, 1, 1, 1)), ((1, 1, 1, 1), (0, 0, 0, 0))])
def test_processes_that_are_started_by_this_one_follow_its_choice(
    machine: Machine, four_cores: None, first: tuple[float, ...], then: tuple[float, ...]
) -> None:
    environment: dict[str, str] = {}
    threads.settle_waiting(environment, machine(*first))
    inherited = dict(environment)
    threads.settle_waiting(inherited, machine(*then))
    assert inherited == environment != {}


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
def test_what_the_user_has_set_stays(machine: Machine, four_cores: None, name: str) -> None:
    environment = {name: "7"}
    threads.settle_waiting(environment, machine(1, 1, 1, 1))
    assert environment == {name: "7"}


def test_after_torch_it_is_too_late(machine: Machine, four_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(threads.sys.modules, "torch", threads)
    environment: dict[str, str] = {}
    threads.settle_waiting(environment, machine(1, 1, 1, 1))
    assert environment == {}


@pytest.mark.parametrize("text", [None, "", "cpu0 1 2\n", "cpu 1 2 3 4 5 6 7 8 0 0\n", "cpu0 0 0 0 0 0 0 0 0 0 0\n"])
def test_a_system_that_does_not_say_is_taken_for_quiet(tmp_path: Path, four_cores: None, text: str | None) -> None:
    if text is not None:
        write(tmp_path, {"proc/stat": text})
    assert threads.busy_cores(tmp_path) == 0


@pytest.mark.parametrize(("ticks", "share"), [(1, 1.0), (7, 1.0), (20, 0.5)])
def test_busy_cores_are_counted_in_parts(machine: Machine, four_cores: None, ticks: int, share: float) -> None:
    assert threads.busy_cores(machine(share, 0, share, 0, ticks=ticks)) == pytest.approx(2 * share)


@pytest.mark.parametrize(("limit", "left"), [("max", 7_000), ("6144000", 3_000), ("1024", 0)])
def test_memory_that_is_left_is_the_machines_or_the_containers(tmp_path: Path, limit: str, left: int) -> None:
    group = tmp_path / "sys/fs/cgroup/box"
    for path, text in {
        tmp_path / "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 7000 kB\n",
        tmp_path / "proc/self/cgroup": "0::/box\n",
        group / "memory.max": f"{limit}\n",
        group / "memory.current": "4096000\n",
        group / "memory.stat": "anon 5\ninactive_file 1000000\nactive_file 24000\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert threads.available_memory(tmp_path) == left * 1024


@pytest.mark.parametrize(("processes", "left"), [(1, 3_000), (2, 6_000), (3, 7_000)])
def test_each_process_has_what_its_limit_of_address_space_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, left: int
) -> None:
    pages = 4096 * 1024 // os.sysconf("SC_PAGE_SIZE")
    write(tmp_path, {"proc/meminfo": "MemAvailable: 7000 kB\n", "proc/self/statm": f"{pages} 5 5 1 0 9 0\n"})
    assert threads.available_memory(tmp_path, processes=processes) == 7_000 * 1024
    monkeypatch.setattr(threads, "address_limit", lambda: 7_096 * 1024)
    assert threads.available_memory(tmp_path, processes=processes) == left * 1024
    monkeypatch.setattr(threads, "address_limit", lambda: 1024)
    assert threads.available_memory(tmp_path) == 0


def test_memory_is_unknown_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert threads.available_memory(tmp_path) is None
