"""A folder belongs to one process, and what dead processes left is told from what is in use."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlmed.core.files import exclusive as holding
from rlmed.core.files.atomic import RecordError, partial_folder, rename_into_place, replace_text
from rlmed.core.files.exclusive import HELD_FILE, OWNER_FILE, FolderInUseError, hold
from rlmed.core.files.ownership import Owner, aside_of, remove_leftovers, writer_of

HOLDER = """
import sys
from pathlib import Path
if "no-locks" in sys.argv:
    from rlmed.core.files import exclusive as holding
    holding.fcntl = None
from rlmed.core.files.exclusive import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder until the end of the context."""
    command = [sys.executable, "-c", HOLDER, str(folder), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture(params=["locks", "no-locks"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no-locks":
        monkeypatch.setattr(holding, "fcntl", None)
    return str(request.param)


def test_the_second_is_told_who_has_it_and_a_killed_one_has_it_no_more(tmp_path: Path, kind: str) -> None:
    with held_elsewhere(tmp_path, kind) as process:
        said = rf" by process {process.pid} on .* since 2.*: choose"
        with pytest.raises(FolderInUseError, match=said), hold(tmp_path, advice="choose another"):
            pass
        assert any((tmp_path / name).is_file() for name in (OWNER_FILE, HELD_FILE))
        process.kill()
        process.wait()
        with hold(tmp_path):
            assert str(os.getpid()) in (tmp_path / (OWNER_FILE if kind == "locks" else HELD_FILE)).read_text()
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_does_not_have_it_twice(tmp_path: Path, kind: str) -> None:
    with hold(tmp_path), pytest.raises(FolderInUseError), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass


def test_a_filesystem_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(holding.fcntl, "flock", unsupported)
    with hold(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [HELD_FILE]
        with pytest.raises(FolderInUseError, match=rf"remove {tmp_path}/{HELD_FILE}"), hold(tmp_path):
            pass


def test_another_machine_may_live_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "fcntl", None)
    card = '{"host": "far", "pid": 1, "since": "2026-01-01 00:00:00", "machine": "00000000", "start": 1}'
    (tmp_path / HELD_FILE).write_text(card)
    with pytest.raises(FolderInUseError, match="process 1 on far since 2026-01-01"), hold(tmp_path):
        pass
    (tmp_path / HELD_FILE).write_text("")  # a process was killed while creating it
    with pytest.raises(FolderInUseError, match="another process"), hold(tmp_path):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"nowhere cannot be written"), hold(tmp_path / "nowhere"):
        pass


def dead_owner() -> Owner:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    start = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    owner = Owner(Owner.me().machine, process.pid, start)
    assert owner.living
    process.communicate()
    assert owner.living is False
    return owner


def test_a_process_with_the_number_of_a_dead_one_is_another() -> None:
    me = Owner.me()
    assert me.living
    assert Owner(me.machine, me.pid, me.start + 1).living is False
    assert Owner("00000000", me.pid, me.start).living is None


def leftover(path: Path, kind: str, owner: Owner | None) -> Path:
    mark = "" if owner is None else f"-{owner.machine}-{owner.pid}-{owner.start}-0"
    folder = path.with_name(f".{path.name}.{kind}{mark}")
    folder.mkdir(parents=True)
    (folder / "content").write_text("")
    return folder


@pytest.mark.parametrize("held", [False, True])
def test_only_what_the_dead_left_is_removed(tmp_path: Path, held: bool) -> None:
    target, me, dead = tmp_path / "step-000004", Owner.me(), dead_owner()
    parent = Owner(
        me.machine, os.getppid(), int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
    )
    mine, living = leftover(target, "partial", me), leftover(target, "partial", parent)
    far = leftover(target, "partial", Owner("00000000", 5, 5))
    gone = [leftover(target, kind, owner) for kind in ("partial", "removed") for owner in (dead, None)]
    other = leftover(tmp_path / "report.html", "partial", dead)
    (tmp_path / ".step-notes").write_text("of the user")
    remove_leftovers(tmp_path, "step-*", held=held)
    assert not any(path.exists() for path in gone)
    kept = {mine, other, tmp_path / ".step-notes"} | (set() if held else {living, far})
    assert set(tmp_path.iterdir()) == kept


def test_what_was_put_away_for_another_that_never_came_is_put_back(tmp_path: Path) -> None:
    dead = dead_owner()
    leftover(tmp_path / "a", "replaced", dead)
    leftover(tmp_path / "b", "replaced", dead)
    (tmp_path / "b").mkdir()
    remove_leftovers(tmp_path, "*")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a" / "content").is_file()
    assert list((tmp_path / "b").iterdir()) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes it all while the first is midway: both are whole, and the last stays."""
    original = Path.write_text

    def overtaken(path: Path, text: str, *args: object, **kwargs: object) -> int:
        monkeypatch.setattr(Path, "write_text", original)
        with path.open("w") as file:
            file.write(text[:3])
            file.flush()
            replace_text(tmp_path / "x.json", "the second")
            file.write(text[3:])
        return len(text)

    monkeypatch.setattr(Path, "write_text", overtaken)
    replace_text(tmp_path / "x.json", "the first, longer")
    assert (tmp_path / "x.json").read_text() == "the first, longer"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_is_renamed_only_where_it_may_replace(tmp_path: Path) -> None:
    target = tmp_path / "data"
    for number, may in ((1, False), (2, False), (3, True)):
        aside = partial_folder(target)
        (aside / str(number)).write_text("")
        assert rename_into_place(aside, target, may_replace=lambda may=may: may) == (number != 2)  # type: ignore[misc]
        if number == 2:
            assert aside.is_dir()
        assert [path.name for path in target.iterdir()] == [str(min(number, 3) if number != 2 else 1)]


def test_the_replaced_may_be_put_away_by_another(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    (target / "old").write_text("")
    aside = partial_folder(target)

    def another_is_faster() -> bool:
        target.rename(tmp_path / "elsewhere")
        return True

    assert rename_into_place(aside, target, may_replace=another_is_faster)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "elsewhere"]


def test_who_writes_a_path(tmp_path: Path) -> None:
    target, me = tmp_path / "out", Owner.me()
    aside_of(target).mkdir()
    leftover(target, "partial", dead_owner())
    assert writer_of(target) is None
    parent = Owner(
        me.machine, os.getppid(), int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
    )
    leftover(target, "partial", parent)
    assert writer_of(target) == parent
