"""A path written another way finds its file or shows the difference; none leaves its folder."""

from __future__ import annotations

import os
import unicodedata
import zipfile
from pathlib import Path

import pytest

from rlmed.core.files.near_paths import MAX_NAMES, Folder, OutsideError, near_path, visible
from rlmed.data.examples import BadRowError
from rlmed.data.readers.formats.image_files import open_images


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "data"
    for name in (
        "images/1.png",
        "images/2.PNG",
        "images/my 3.png",
        "images/004.png",
        "images/volume.nii.gz",
        "images/a-b.png",
        "images/1.2.840.7.dcm",
        unicodedata.normalize("NFC", "größe/ü.png"),
        unicodedata.normalize("NFD", "größe/é.png"),
        "other/17.png",
        "x/source.jpg",
        "y/source.jpg",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (tmp_path / "outside.png").touch()
    return folder


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("images/1.png", "images/1.png"),
        ("images\\1.png", "images/1.png"),
        (".\\images\\1.png", "images/1.png"),
        ("./images//1.png", "images/1.png"),
        ("images/../images\\1.png", "images/1.png"),
        (" images/1.png \t", "images/1.png"),
        ("images\\1.png\u00a0", "images/1.png"),
        (unicodedata.normalize("NFD", "größe/ü.png"), "größe/ü.png"),
        (unicodedata.normalize("NFC", "größe/é.png"), "größe/é.png"),
        (unicodedata.normalize("NFD", "größe\\ü.png"), "größe/ü.png"),
    ],
)
def test_what_is_meant_without_doubt_is_found(root, text, found):
    path = Folder(root).locate(text)
    assert path.is_file()
    assert unicodedata.normalize("NFC", path.relative_to(root).as_posix()) == found


def test_a_name_with_a_backslash_goes_first(root):
    (root / "images\\1.png").touch()
    assert Folder(root).locate("images\\1.png") == root / "images\\1.png"


def test_two_names_that_look_the_same_are_told_apart(root):
    composed, apart = (unicodedata.normalize(form, "größe/ü.png") for form in ("NFC", "NFD"))
    (root / apart).parent.mkdir(exist_ok=True)
    (root / "größe" / Path(apart).name).touch()
    folder = Folder(root)
    assert folder.locate(composed) == root / composed
    assert os.fspath(folder.locate("größe/" + Path(apart).name)).endswith(Path(apart).name)


@pytest.mark.parametrize(
    "text",
    [
        "../outside.png",
        "..\\outside.png",
        "..\\..\\x",
        "images\\..\\..\\outside.png",
        "images/..\\../outside.png",
        "/etc/hostname",
        "\\etc\\hostname",
        "C:\\data\\1.png",
        "c:/data/1.png",
        "\\\\server\\share\\1.png",
        "link.png",
        "up\\outside.png",
        "up/outside.png",
        " ../outside.png",
    ],
)
def test_nothing_leaves_the_folder(root, text):
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "up").symlink_to(root.parent)
    with pytest.raises(OutsideError):
        Folder(root).locate(text)


def test_a_link_under_another_coding_leads_nowhere_else(root):
    (root / unicodedata.normalize("NFD", "ö.png")).symlink_to(root.parent / "outside.png")
    with pytest.raises(OutsideError):
        Folder(root).locate(unicodedata.normalize("NFC", "ö.png"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("Images/1.PNG", "there is 'images/1.png', which differs in case"),
        ("IMAGES\\2.png", "there is 'images/2.PNG', which differs in case"),
        ("images/my\u00a03.png", "there is 'images/my 3.png', which differs in blanks"),
        ("images/my  3.png", "there is 'images/my 3.png', which differs in blanks"),
        ("images/my%203.png", "there is 'images/my 3.png', which differs in percent-encoding"),
        ("images/1\u200b.png", "there is 'images/1.png', which differs in characters that cannot be seen"),
        ("\ufeffimages/1.png", "there is 'images/1.png', which differs in characters that cannot be seen"),
        ("im\u0430ges/1.png", "there is 'images/1.png', which differs in characters that look alike"),
        ("images/a\u2013b.png", "there is 'images/a-b.png', which differs in characters that look alike"),
        ("images/\uff11.png", "there is 'images/1.png', which differs in characters that look alike"),
        ("images/1.png.png", "there is 'images/1.png', which differs in its ending"),
        ("images/1", "there is 'images/1.png', which differs in its ending"),
        ("images/1.jpg", "there is 'images/1.png', which differs in its ending"),
        ("images/volume.nii", "there is 'images/volume.nii.gz', which differs in its ending"),
        ("images/1.2.840.7", "there is 'images/1.2.840.7.dcm', which differs in its ending"),
        ("images/4.png", "there is 'images/004.png', which differs in leading zeros"),
        ("'images/1.png'", "there is 'images/1.png', which differs in quotation marks around it"),
        ("file://images/1.png", "there is 'images/1.png'"),
        ("/images/1.png", "there is 'images/1.png'"),
        ("file:///home/x/images/1.png", "there is 'images/1.png'"),
        ("/home/x/images/1.png", "there is 'images/1.png'"),
        ("C:\\data\\images\\1.png", "there is 'images/1.png'"),
        ("D:\\Data\\Images\\1.PNG", "there is 'images/1.png', which differs in case"),
        ("/home/1.png", "there is 'images/1.png', in another folder"),
        ("1.png", "there is 'images/1.png', in another folder"),
        ("1.PNG", "there is 'images/1.png', in another folder, which differs in case"),
        ("images/17.png", "there is 'other/17.png', in another folder"),
    ],
)
def test_what_is_near_is_shown_with_its_difference(root, text, hint):
    assert str(Folder(root).near(text)) == hint


@pytest.mark.parametrize(
    "text",
    [
        "images/9.png",
        "z/source.jpg",
        "",
        "/",
        "..",
        "C:",
        "images/1.2.840.8",
        "x" * 5000,
        "a/" * 5000,
        "\0",
        "1.2.840.7/5",
    ],
)
def test_nothing_is_made_up(root, text):
    assert Folder(root).near(text) is None


def test_the_search_has_an_end(root, monkeypatch):
    monkeypatch.setattr("rlmed.core.files.near_paths.MAX_NAMES", 1)
    assert MAX_NAMES > 1
    assert Folder(root).near("Other/17.png") is None


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("Data/images", "there is 'data/images', which differs in case"),
        ("data\\images\\1.png", "there is 'data/images/1.png', which differs in backslashes"),
        ("data/Images/1.PNG", "there is 'data/images/1.png', which differs in case"),
        ("data/images/1", "there is 'data/images/1.png', which differs in its ending"),
        ("data/images/1.png ", "there is 'data/images/1.png', which differs in blanks"),
        ("data/images/1.png\u200b", "there is 'data/images/1.png', which differs in characters that cannot be seen"),
        ("./data/imagse", ""),
        ("nowhere/at/all", ""),
        ("/nowhere/at/all", ""),
        ("data/images/1.png", ""),
        ("x" * 5000, ""),
        ("\0", ""),
    ],
)
def test_paths_that_a_user_gives(root, monkeypatch, text, hint):
    monkeypatch.chdir(root.parent)
    assert near_path(text) == hint


def test_absolute_paths_that_a_user_gives(root):
    assert near_path(root / "Images") == f"there is '{root / 'images'}', which differs in case"


def test_what_the_shell_left_as_it_was(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    assert near_path("~/images") == f"the shell did not expand the ~ in it; there is '{root / 'images'}'"
    assert near_path("$HOME/images") == f"the shell did not expand the $ in it; there is '{root / 'images'}'"


def test_what_cannot_be_seen_is_taken_off_the_ends():
    assert visible("\ufeff\u200b image \u200b\u00a0") == "image"


@pytest.fixture
def archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as written:
        for name in ("images/1.png", unicodedata.normalize("NFD", "images/ü.png"), "ct\\7.png", "a/2.png", "b/2.png"):
            written.writestr(name, b"")
    return open_images(tmp_path / "images.zip")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("images\\1.png", "images/1.png"),
        ("./images/1.png", "images/1.png"),
        ("C:\\data\\images\\1.png", "images/1.png"),
        ("ct/7.png", "ct\\7.png"),
        ("ct\\7.png", "ct\\7.png"),
        ("images/\u00fc.png", "images/u\u0308.png"),
        ("a\\2.png", "a/2.png"),
    ],
)
def test_members_of_an_archive(archive, text, name):
    assert archive.find(text).name == name


def test_near_members_of_an_archive(archive):
    with pytest.raises(BadRowError, match=r"'images/1\.png'.*case"):
        archive.find("images/1.PNG")
    with pytest.raises(BadRowError, match="2 files have its name"):
        archive.find("2.png")


def test_an_image_to_search_for_by_the_path_of_another_system(root):
    images = open_images(root)
    assert images.find("old\\17.png") == root / "other" / "17.png"
    assert images.find("other\\17.png") == root / "other" / "17.png"
    with pytest.raises(BadRowError, match=r"leaves the folder .*'other/17\.png'"):
        images.find("C:\\other\\17.png")
