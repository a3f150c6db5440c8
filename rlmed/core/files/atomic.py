"""Write files and folders atomically: written to a temporary name, then renamed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rlmed.core.files.ownership import aside_of, remove, remove_leftovers

FREE_SPACE = "Free some space"
REMEDIES: dict[int | None, str] = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make its folder writable"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit of open files (ulimit -n)"),
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f)",
    errno.EIO: "Check the disk",
}
"""What to do about errors of the system."""


class RecordError(OSError):
    """A file of the run cannot be written or truncated; the message names it and what to do."""

    def __str__(self) -> str:
        """Return the message without its errno prefix."""
        return self.strerror or super().__str__()


def refusal(path: Path, error: OSError, *, advice: str = "start again with resume=auto to continue") -> RecordError:
    """Return a RecordError that says why `path` could not be written and what to do."""
    reason, remedy = in_the_way(path, error)
    return RecordError(error.errno, f"{path} cannot be written: {reason}. {remedy} and {advice}")


def in_the_way(path: Path, error: OSError) -> tuple[str, str]:
    """Return why the system rejected `path`, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full", FREE_SPACE
    if error.errno == errno.ENAMETOOLONG:
        return "the name is too long", "Shorten it"
    if error.errno == errno.EISDIR:
        found = error.filename2 or error.filename or path
        return f"{found} is a folder where a file must go", "Rename it"
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENOENT):
        for found in (path, *path.parents):
            if found.is_symlink() and not found.exists():
                return f"{found} is a broken link to {found.readlink()}", "Remove it"
            if found.is_file():
                return f"{found} is a file where a folder must go", "Rename it"
    return error.strerror or str(error), REMEDIES.get(error.errno, "Mend this")


def replace_text(path: Path, text: str) -> Path:
    """Write `text` to `path` as UTF-8, creating its folder; lone surrogates become "?".

    If several processes write at once, the last text wins, whole.

    Raises:
        RecordError: if the write fails; an earlier file of that name is untouched.
    """
    aside = aside_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        try:
            aside.write_text(text, encoding="utf-8", errors="replace")
            return aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise refusal(path, error) from error


def partial_folder(folder: Path) -> Path:
    """Create an empty temporary folder beside `folder`, for `rename_into_place`.

    Leftovers of killed processes are removed. `folder` must be absolute.
    """
    remove_leftovers(folder.parent, folder.name)
    aside = aside_of(folder)
    aside.mkdir(parents=True)
    return aside


def rename_into_place(aside: Path, folder: Path, *, may_replace: Callable[[], bool]) -> bool:
    """Rename a finished folder into place atomically, even if other processes use the same name.

    Args:
        aside: from `partial_folder`.
        folder: the final name; an empty folder of that name is replaced.
        may_replace: called if a non-empty folder has the name, which may have appeared only now:
            True moves it away, False leaves it and `aside` as they are. It may raise.

    Returns:
        True if `aside` is now `folder`.
    """
    replaced: list[Path] = []
    while True:
        try:
            aside.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not folder.is_dir():
                raise
        if not may_replace():
            return False
        away = aside_of(folder, "replaced")
        with suppress(FileNotFoundError):  # another process was faster
            folder.rename(away)
            replaced.append(away)
    for path in replaced:
        remove(path)
    return True
