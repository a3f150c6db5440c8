"""Files that are whole or not there: written aside, then renamed; an error names the file and the cure."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


class RecordError(OSError):
    """A file of the run could not be written or cut back; the message names it and the cure."""

    def __str__(self) -> str:
        """The message, without the number in front of it that users would have to look up."""
        return self.strerror or super().__str__()


def refusal(path: Path, error: OSError, *, cure: str = "start again with resume=auto") -> RecordError:
    """The error that says why `path` could not be written and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"the disk is full: {path} cannot be written. Free some space and {cure}"
    else:
        message = f"{path} cannot be written: {error.strerror}. Make its folder writable and {cure}"
    return RecordError(error.errno, message)


def replace_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, whose folder is made if missing; characters that UTF-8 lacks become "?".

    Raises:
        RecordError: when the disk refuses; an earlier file of that name is untouched.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8", errors="replace")
        return aside.replace(path)
    except OSError as error:
        raise refusal(path, error) from error


def partial_folder(folder: Path) -> Path:
    """A new, empty folder beside `folder` in which its content is written, for `rename_into_place`.

    What a killed process of the same number left there is removed; `folder` must be absolute.
    """
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    return aside


def rename_into_place(aside: Path, folder: Path) -> None:
    """Give a finished folder its name; one that has the name already goes, once the new one stands in its place."""
    if not folder.exists():
        aside.rename(folder)
        return
    outdated = aside.with_name(aside.name + "-old")
    folder.rename(outdated)
    aside.rename(folder)
    shutil.rmtree(outdated)
