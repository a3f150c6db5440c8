"""Lock a folder for one process.

The lock is on the folder's file `.owner`; the system releases it when the process ends, however it
ends. The file names the owner and is removed at the end of a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlmed.core.files.atomic import refusal
from rlmed.core.files.ownership import Owner, aside_of

try:
    import fcntl
except ImportError:  # not POSIX: treated as a filesystem without locks
    fcntl = None  # type: ignore[assignment]

OWNER_FILE = ".owner"
HELD_FILE = ".owner-held"
"""Lock file for filesystems without locks."""


class FolderInUseError(ValueError):
    """Another process holds the folder; the message names both."""


@contextmanager
def hold(folder: Path, *, advice: str = "wait until it has ended, or choose another folder") -> Iterator[None]:
    """Lock an existing folder for this process.

    Args:
        folder: folder to hold until the context or the process ends.
        advice: what the user can do if another process holds it.

    Raises:
        FolderInUseError: if another living process holds it.
        RecordError: if the folder is not writable.
    """
    try:
        descriptor = _lock(folder, advice)
        if descriptor is None:
            _create_held(folder, advice)
    except OSError as error:
        raise refusal(folder, error, advice="try again") from error
    try:
        yield
    finally:
        # unlink before unlocking: a process waiting for this file checks that it still exists
        with contextlib.suppress(OSError):
            (folder / (HELD_FILE if descriptor is None else OWNER_FILE)).unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path, advice: str) -> int | None:
    """Return the descriptor that holds the lock; None on a filesystem without locks."""
    if fcntl is None:
        return None
    path = folder / OWNER_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _in_use(folder, path, advice) from None
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        if _same_file(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _card())
            return descriptor
        os.close(descriptor)  # its owner removed it between the two calls


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _create_held(folder: Path, advice: str) -> None:
    """Create the file with O_EXCL, after removing one left by a dead process."""
    path = folder / HELD_FILE
    with contextlib.suppress(FileNotFoundError):
        before = path.read_bytes()
        card = _read_card(before)
        if card is not None and Owner(card["machine"], card["pid"], card["start"]).living is False:
            aside = aside_of(path, "removed")
            path.rename(aside)
            if aside.read_bytes() != before:  # another process was faster, and this is its file
                aside.rename(path)
                raise _in_use(folder, path, advice)
            aside.unlink()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        advice = f"{advice}; if it is no longer running, remove {path}"
        raise _in_use(folder, path, advice) from None
    os.write(descriptor, _card())
    os.close(descriptor)


def _card() -> bytes:
    """Return the content of the owner's file."""
    me = Owner.me()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    content = {"host": socket.gethostname(), "pid": me.pid, "since": since, "machine": me.machine, "start": me.start}
    return (json.dumps(content) + "\n").encode()


def _read_card(content: bytes) -> dict[str, Any] | None:
    try:
        return dict(json.loads(content))
    except ValueError:  # half written
        return None


def _in_use(folder: Path, path: Path, advice: str) -> FolderInUseError:
    try:
        card = _read_card(path.read_bytes())
    except OSError:
        card = None
    who = f"process {card['pid']} on {card['host']} since {card['since']}" if card else "another process"
    return FolderInUseError(f"{folder} is in use by {who}: {advice}")
