"""Temporary files and folders carry their owner in their name, so what a dead process left is told from what is in use."""

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
"""Being written; put away for another that is about to get its name; being removed."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told from all others that had or will have its number.

    Example:
        Owner(machine="5f0c21aa", pid=4711, start=88123)
    """

    machine: str
    """Of the host's name and, on Linux, its namespace of process numbers: containers may share everything else."""
    pid: int
    start: int
    """When it was started, in clock ticks after the boot; 0 where the system does not say."""

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        return cls(_machine(), os.getpid(), _start_of(os.getpid()) or 0)

    @property
    def living(self) -> bool | None:
        """Whether it still runs; None for a process of another machine, of which nothing is known here."""
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
    """A name beside `path` that is this call's alone: `.NAME.KIND-OWNER`."""
    me = Owner.me()
    return path.with_name(f".{path.name}.{kind}-{me.machine}-{me.pid}-{me.start}-{next(_counter)}")


def writer_of(path: Path) -> Owner | None:
    """A living process, not this one, that is writing `path` aside; None where there is none on this machine."""
    me = Owner.me()
    for _, match in _asides(path.parent, path.name):
        owner = _owner(match)
        if match["kind"] == "partial" and owner is not None and owner != me and owner.living:
            return owner
    return None


def remove_leftovers(folder: Path, name: str, *, held: bool = False) -> None:
    """Remove what dead processes left in `folder` while they wrote, replaced or removed paths of a name.

    What was put away for another that never came gets its name back.

    Args:
        folder: where to look; nothing is done when there is no such folder.
        name: of these paths; "step-*" means all names that begin so.
        held: the folder is this process's alone (`rlmed.core.holding`), so whatever another one wrote there is a leftover,
            also where the other was on another machine.
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
    """None for a name without an owner, as earlier versions gave them."""
    return None if match["machine"] is None else Owner(match["machine"], int(match["pid"]), int(match["start"]))


def remove(path: Path) -> None:
    """Remove a file or folder; one that is gone already, or that another process removes too, is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):  # the latter where its folder is none
            path.unlink()


def _machine() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _start_of(pid: int) -> int | None:
    """Start of a process in clock ticks; 0 for one that has ended and was not waited for, None where it is not known."""
    try:
        # its name, which may hold anything, stands in brackets before
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])
