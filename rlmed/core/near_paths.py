"""Paths that people and tables write, and the files that they mean.

Two ways of writing a path name the same file without doubt and are followed: backslashes for slashes, and accents that are
composed or decomposed (macOS and Linux differ there). Every other difference stays an error that shows it: case, characters
that cannot be seen, another ending, the folder of another machine.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

from rlmed.core.litter import walk_data

MAX_NAMES = 200_000
"""Files of a folder that are looked through for one that a missing path may mean."""
MAX_TEXT = 1000
"""Characters of a path; nothing is looked for under a longer one."""

_UNSEEN = "\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe0f\ufeff"
_UNSEEN_OR_CONTROL = re.compile(f"[{_UNSEEN}\x00-\x08\x0e-\x1b\x7f]")
_AROUND = re.compile(rf"^[\s{_UNSEEN}]+|[\s{_UNSEEN}]+$")
# Cyrillic and Greek letters that look Latin, and what word processors make of dashes and apostrophes
_ALIKE = str.maketrans(
    "АВЕКМНОРСТХУІЈЅаеорсухіјѕΑΒΕΖΗΙΚΜΝΟΡΤΥΧοⅼ‐‑‒–—−’‘ʼ´",
    "ABEKMHOPCTXYIJSaeopcyxijsABEZHIKMNOPTYXol------''''",
)
_ENDINGS = re.compile(r"(\.[A-Za-z][A-Za-z0-9]{0,4}){1,3}$")
_DRIVE = re.compile("[A-Za-z]:$")

_Sight = tuple[str, Callable[[str], str]]
_SIGHTS: tuple[_Sight, ...] = (
    ("backslashes", lambda text: text.replace("\\", "/")),
    ("quotation marks around it", lambda text: text.strip("'\"")),
    ("percent-encoding", unquote),
    ("characters that cannot be seen", lambda text: _UNSEEN_OR_CONTROL.sub("", text)),
    ("blanks", lambda text: "/".join(" ".join(part.split()) for part in text.split("/"))),
    ("the coding of accents", lambda text: unicodedata.normalize("NFC", text)),
    ("characters that look alike", lambda text: look_alike(text)),
    ("case", str.casefold),
    ("leading zeros", lambda text: re.sub(r"(?<!\d)0+(?=\d)", "", text)),
)
"""What two spellings may differ in, and what does away with that difference."""
_ENDING: _Sight = ("its ending", lambda text: _ENDINGS.sub("", text))


class OutsideError(ValueError):
    """A path that leaves the folder that it must stay in."""


@dataclass(frozen=True, slots=True)
class Near:
    """A file that a missing path may mean.

    Example:
        Near(path="images/1.PNG", moved=False, differs=("case",))
    """

    path: str
    """From the folder on."""
    moved: bool
    """It lies in another folder than the text says."""
    differs: tuple[str, ...]
    """In what the names differ; empty where they don't, apart from the folder."""

    @property
    def difference(self) -> str:
        """In words, without the name: `in another folder, which differs in case`."""
        where = ["in another folder"] if self.moved else []
        return ", ".join(where + ([f"which differs in {' and '.join(self.differs)}"] if self.differs else []))

    def __str__(self) -> str:
        """`there is 'images/1.PNG', which differs in case`; what cannot be seen is shown as an escape."""
        hidden = {"the coding of accents", "characters that look alike"} & {*self.differs}
        shown = ascii(self.path) if hidden else repr(self.path)
        return f"there is {shown}{', ' if self.difference else ''}{self.difference}"


class Names:
    """Paths by how they look, to find the one that somebody may have meant."""

    def __init__(self, paths: Iterable[str]) -> None:
        """Take paths with slashes, all from the same folder on."""
        self._by_look: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        for path in paths:
            look = _look(path.rpartition("/")[2])
            self._by_look.setdefault(look, []).append(path)
            self._by_stem.setdefault(_ENDING[1](look), []).append(path)

    def near(self, text: str, *, elsewhere: bool = True) -> Near | None:
        """The one path that looks like `text`; with `elsewhere`, the only one whose end does, too."""
        if len(text) > MAX_TEXT:
            return None
        parts = _parts(text)
        if not parts:
            return None
        found = self._by_look.get(parts[-1], [])
        tails = {path: _common_tail(_parts(path), parts) for path in found}
        longest = max(tails.values(), default=0)
        best = [path for path in found if tails[path] == longest]
        here = [path for path in best if longest == len(parts) == len(_parts(path))]
        if here or (elsewhere and len(best) == 1):
            path = (here or best)[0]
            ends = ["/".join(_split(whole)[-longest:]) for whole in (text, path)]
            return Near(path, len(_parts(path)) > longest, _differs(*ends))
        folder, stem = parts[:-1], _ENDING[1](parts[-1])
        others = [path for path in self._by_stem.get(stem, []) if _parts(path)[:-1] == folder]
        if len(others) == 1:
            return Near(others[0], False, _differs("/".join(_split(text)), others[0]))
        return None


class Folder:
    """The files below a folder, as rows name them."""

    def __init__(self, root: Path) -> None:
        """Nothing is read yet."""
        self.root = Path(os.path.realpath(root))
        self._names: Names | None = None
        self._composed: dict[Path, dict[str, list[str]]] = {}
        """Names in a folder by their composed form."""

    def locate(self, text: str) -> Path:
        """The real path of the file that `text` names from the folder on; it may be missing.

        Raises:
            OutsideError: for an absolute path, or one that leaves the folder by `..` or by a link.
        """
        path = self._inside(text)
        if os.path.exists(path):  # a name may hold a backslash on most systems
            return path
        spelled = text.strip().replace("\\", "/")
        path = self._inside(spelled)
        if os.path.exists(path):
            return path
        return self._inside(self._as_stored(path))

    def near(self, text: str) -> Near | None:
        """What a missing path may mean."""
        if self._names is None:
            self._names = Names(islice(_files(self.root), MAX_NAMES))
        return self._names.near(text)

    def _inside(self, text: str) -> Path:
        # realpath, since Path.resolve raises for links that go in circles
        path = Path(os.path.realpath(self.root / text))
        foreign = Path(text).is_absolute() or (PureWindowsPath(text).is_absolute() and not os.path.exists(path))
        if foreign or not path.is_relative_to(self.root):
            raise OutsideError(text)
        return path

    def _as_stored(self, path: Path) -> str:
        """The path from the root on, with accents as the names on the disk have them, if just one file is called so."""
        parts = path.relative_to(self.root).parts
        found = [self.root]
        for part in parts:
            found = [folder / name for folder in found for name in self._alike(folder, part)]
        return str((found[0] if len(found) == 1 else path).relative_to(self.root))

    def _alike(self, folder: Path, name: str) -> Sequence[str]:
        if name.isascii():
            return [name]
        if folder not in self._composed:
            self._composed[folder] = {}
            for stored in _listed(folder):
                self._composed[folder].setdefault(unicodedata.normalize("NFC", stored), []).append(stored)
        return self._composed[folder].get(unicodedata.normalize("NFC", name), [])


def look_alike(text: str) -> str:
    """The text in Latin letters, digits and marks where it has others that look like them."""
    return unicodedata.normalize("NFKC", text.translate(_ALIKE))


def visible(text: str) -> str:
    """The text without white space, and characters that cannot be seen, around it."""
    return _AROUND.sub("", text)


def near_path(path: Path | str) -> str:
    """What a path that a user gave, and that is missing, may mean; "" where nothing is like it.

    Example:
        >>> near_path("Data/train.jsonl")                                           # doctest: +SKIP
        "there is 'data/train.jsonl', which differs in case"
    """
    text = str(path)
    if os.path.exists(text):
        return ""
    for whole in (os.path.expanduser(text), os.path.expandvars(text)):
        if whole != text and os.path.exists(whole):
            return f"the shell has not replaced the {text[0]} in it; there is {whole!r}"
    slashed = text.replace("\\", "/")
    base, rest = Path(slashed), list[str]()
    while not os.path.isdir(base) and base != base.parent:
        base, rest = base.parent, [base.name, *rest]
    if not rest or len(text) > MAX_TEXT:
        return ""
    names = Names(_entries(base, [_look(part) for part in rest]))
    near = names.near("/".join(rest), elsewhere=False)
    if near is None:
        return ""
    found = near.path if str(base) == "." else f"{str(base).rstrip('/')}/{near.path}"
    return str(Near(found, False, _differs(text.removeprefix("./"), found)))


def _files(root: Path) -> Iterator[str]:
    for folder, _, names in walk_data(root):
        inner = os.path.relpath(folder, root).replace(os.sep, "/")
        yield from (name if inner == "." else f"{inner}/{name}" for name in names)


def _entries(root: Path, looks: Sequence[str]) -> Iterator[str]:
    """Files and folders in the folders that look so."""
    for name in _listed(root):
        if len(looks) == 1:
            yield name
        elif _look(name) == looks[0]:
            yield from (f"{name}/{inner}" for inner in _entries(root / name, looks[1:]))


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # missing, no folder, or not ours to read
        return []


def _split(text: str) -> list[str]:
    """Components of a path as it is written, without what says where it starts."""
    plain = text.replace("\\", "/")
    plain = re.sub(r"^\s*[A-Za-z]+://", "", plain)
    return [part for part in plain.split("/") if part not in ("", ".", "..") and not _DRIVE.match(part)]


def _parts(text: str) -> list[str]:
    return [_look(part) for part in _split(text)]


def _look(text: str) -> str:
    for _, alike in _SIGHTS:
        text = alike(text)
    return text


def _common_tail(left: list[str], right: list[str]) -> int:
    count = 0
    for one, other in zip(reversed(left), reversed(right), strict=False):
        if one != other:
            break
        count += 1
    return count


def _differs(written: str, stored: str) -> tuple[str, ...]:
    """The fewest of `_SIGHTS`, or the ending too, that have to be done away with for both to be the same."""

    def same(sights: Iterable[_Sight]) -> bool:
        left, right = written, stored
        for _, alike in sights:
            left, right = alike(left), alike(right)
        return left == right

    needed = [*_SIGHTS, _ENDING]
    for sight in reversed((*_SIGHTS, _ENDING)):
        fewer = [other for other in needed if other is not sight]
        if same(fewer):
            needed = fewer
    return tuple(name for name, _ in needed)
