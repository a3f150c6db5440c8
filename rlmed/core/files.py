"""Files that are whole or not there: written aside, then renamed; an error names the file and the cure."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rlmed.core.ownership import aside_of, remove, remove_leftovers

ASSETS = Path(__file__).parents[1] / "assets"
"""What ships with rlmed, beside its code: in the folder that holds a checkout, the package itself has no place."""


class RecordError(OSError):
    """A file of the run could not be written or cut back; the message names it and the cure."""

    def __str__(self) -> str:
        """The message, without the number in front of it that users would have to look up."""
        return self.strerror or super().__str__()


def refusal(path: Path, error: OSError, *, cure: str = "start again; training goes on with resume=auto") -> RecordError:
    """The error that says why `path` could not be written and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"the disk is full: {path} cannot be written. Free some space and {cure}"
    else:
        reason, remedy = _in_the_way(path, error)
        message = f"{path} cannot be written: {reason}. {remedy} and {cure}"
    return RecordError(error.errno, message)


def _in_the_way(path: Path, error: OSError) -> tuple[str, str]:
    """Why the system refused `path`, and what to do about it."""
    if error.errno == errno.ENAMETOOLONG:
        return "the name is too long", "Shorten it"
    if error.errno == errno.EISDIR:
        place = error.filename2 or error.filename or path
        return f"{place} is a folder, where a file is to be", "Rename it"
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENOENT):
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                return f"{place} is a link to {place.readlink()}, which leads nowhere", "Remove it"
            if place.is_file():
                return f"{place} is a file, where a folder is to be", "Rename it"
    return error.strerror or str(error), "Make its folder writable"


def replace_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, whose folder is made if missing; characters that UTF-8 lacks become "?".

    Of several processes that do so at once, the last one's text is there whole.

    Raises:
        RecordError: when the disk refuses; an earlier file of that name is untouched.
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
    """A new, empty folder beside `folder` in which its content is written, for `rename_into_place`.

    What killed processes left there is removed; `folder` must be absolute.
    """
    remove_leftovers(folder.parent, folder.name)
    aside = aside_of(folder)
    aside.mkdir(parents=True)
    return aside


def rename_into_place(aside: Path, folder: Path, *, may_replace: Callable[[], bool]) -> bool:
    """Give a finished folder its name, at once and whole, whatever other processes do to that name meanwhile.

    Args:
        aside: from `partial_folder`.
        folder: its name to be; an empty folder of that name is no obstacle.
        may_replace: asked when a folder with content has the name, which may have come there only now: True puts it away,
            and False leaves it and `aside` as they are. It may raise.

    Returns:
        Whether `folder` is now what `aside` was.
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
