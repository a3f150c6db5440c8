"""Why a file could not be written is said as it is, with the advice."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from rlmed.core.files.atomic import RecordError, refusal, replace_text
from rlmed.core.files.ownership import remove


def refused(path: Path) -> str:
    """What is said where `path` shall be written."""
    with pytest.raises(RecordError) as caught:
        replace_text(path, "text")
    return str(caught.value)


@pytest.mark.parametrize("deeper", ["x", "x/y", "x/y/z"])
def test_a_file_where_a_folder_is_to_be(tmp_path: Path, deeper: str) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused(tmp_path / "file" / deeper)
    assert f": {tmp_path}/file is a file where a folder " in said
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_link_that_leads_nowhere(tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(target)
    assert f"{tmp_path}/link is a broken link to {target}. " in refused(tmp_path / "link" / "x")


def test_a_folder_where_a_file_is_to_be(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    said = refused(tmp_path / "report.html")
    assert f"{tmp_path}/report.html is a folder where a file " in said
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    assert "name is too long. Shorten" in refused(tmp_path / ("ü" * 200) / "x")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EPERM, "Make its folder writable"),
        (errno.EACCES, "Make its folder writable"),
        (errno.EROFS, "Make its folder writable"),
        (errno.EIO, "Check the disk"),
        (errno.EFBIG, "Raise the limit of a file's size (ulimit -f)"),
        (errno.EMFILE, "Raise the limit of open files (ulimit -n)"),
        (errno.ENXIO, "Mend this"),
    ],
)
def test_other_errors_are_said_in_the_systems_words(tmp_path: Path, number: int, remedy: str) -> None:
    error = OSError(number, "so it is")
    assert str(refusal(tmp_path, error)).startswith(f"{tmp_path} cannot be written: so it is. {remedy} and ")


def test_what_cannot_be_there_is_removed_already(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    remove(tmp_path / "file" / "x")
    remove(tmp_path / "nothing")
    assert (tmp_path / "file").read_text() == "mine"
