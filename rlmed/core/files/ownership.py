"""Name temporary files and folders by owner, to tell dead processes' leftovers from used ones."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_ASIDE = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>partial|replaced|removed)(?:-(?P<machine>[0-9a-f]{8})-(?P<pid>\d{1,9})-(?P<start>\d+)-\d+)?"
)
_counter = itertools.count()
Kind = Literal["partial", "replaced", "removed"]
"""Being written; moved away to make room for a replacement; being removed."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, distinguished from all others with the same pid.

    Example:
        Owner(machine="5f0c21aa", pid=4711, start=88123)
    """

    machine: str
    """Hash of host name and, on Linux, pid namespace: containers may share everything else."""
    pid: int
    start: int
    """Start time in clock ticks since boot; 0 if unknown."""

    @classmethod
    def me(cls) -> Owner:
        """Return the owner record of this process."""
        return cls(_machine(), os.getpid(), _start_of(os.getpid()) or 0)

    @property
    def living(self) -> bool | None:
        """Whether it is still running; None (unknown) for a process on another machine."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True  # of another user
        start = _start_of(self.pid)
        return start is None or start == self.start


def aside_of(path: Path, kind: Kind = "partial") -> Path:
    """Return a unique name beside `path`: `.NAME.KIND-OWNER`."""
    me = Owner.me()
    return path.with_name(f".{path.name}.{kind}-{me.machine}-{me.pid}-{me.start}-{next(_counter)}")


def writer_of(path: Path) -> Owner | None:
    """Return another living process on this machine that is writing `path`, or None."""
    me = Owner.me()
    for _, match in _asides(path.parent, path.name):
        owner = _owner(match)
        if match["kind"] == "partial" and owner is not None and owner != me and owner.living:
            return owner
    return None


def remove_leftovers(folder: Path, name: str, *, held: bool = False) -> None:
    """Remove what dead processes left in `folder` while writing, replacing or removing a path.

    A path moved away for a replacement that never came gets its name back.

    Args:
        folder: folder to clean; no-op if it does not exist.
        name: name of the path; "step-*" matches all names with that prefix.
        held: this process holds the folder (`rlmed.core.files.exclusive`), so everything that other
            processes wrote there, on any machine, is a leftover.
    """
    me = Owner.me()
    for path, match in _asides(folder, name):
        owner = _owner(match)
        if owner is not None and owner.living is not False and not (held and owner != me):
            continue
        target = folder / match["name"]
        if match["kind"] == "replaced" and not target.exists():
            with suppress(OSError):  # another process was faster
                path.rename(target)
        else:
            remove(path)


def _asides(folder: Path, name: str) -> list[tuple[Path, re.Match[str]]]:
    if not folder.is_dir():
        return []
    matches = [(path, match) for path in folder.iterdir() if (match := _ASIDE.fullmatch(path.name))]
    if name.endswith("*"):
        return [(path, match) for path, match in matches if match["name"].startswith(name[:-1])]
    return [(path, match) for path, match in matches if match["name"] == name]


def _owner(match: re.Match[str]) -> Owner | None:
    """Parse the owner; None for names of earlier versions, which lack one."""
    return None if match["machine"] is None else Owner(match["machine"], int(match["pid"]), int(match["start"]))


def remove(path: Path) -> None:
    """Remove a file or folder; no error if it is already gone or another process removes it too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # the latter if its parent is not a folder
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def _machine() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _start_of(pid: int) -> int | None:
    """Return a process's start in clock ticks; 0 for a zombie, None if unknown."""
    try:
        # the process name, in brackets before the fields, may contain anything
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])
