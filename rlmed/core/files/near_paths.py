"""Find the file that a written path means.

Two differences in spelling are unambiguous and accepted: backslashes for slashes, and composed or
decomposed accents (macOS and Linux differ there). Every other difference is an error that shows it:
case, invisible characters, another extension, the folder of another machine.
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

from rlmed.core.files.litter import walk_data

MAX_NAMES = 200_000
"""Most files of a folder to search for the one that a missing path may mean."""
MAX_TEXT = 1000
"""Longest path, in characters, that is searched for."""

_UNSEEN = "\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe0f\ufeff"
_UNSEEN_OR_CONTROL = re.compile(f"[{_UNSEEN}\x00-\x08\x0e-\x1b\x7f]")
_AROUND = re.compile(rf"^[\s{_UNSEEN}]+|[\s{_UNSEEN}]+$")
# Cyrillic and Greek letters that look Latin, and what word processors make of dashes and
# apostrophes
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
"""Differences between two spellings, each with the function that removes it."""
_ENDING: _Sight = ("its ending", lambda text: _ENDINGS.sub("", text))


class OutsideError(ValueError):
    """A path leaves its root folder."""


@dataclass(frozen=True, slots=True)
class Near:
    """A file that a missing path may mean.

    Example:
        Near(path="images/1.PNG", moved=False, differs=("case",))
    """

    path: str
    """Relative to the folder."""
    moved: bool
    """True if it lies in another folder than written."""
    differs: tuple[str, ...]
    """How the names differ; empty if only the folder does."""

    @property
    def difference(self) -> str:
        """Describe the difference without the name: `in another folder, which differs in case`."""
        where = ["in another folder"] if self.moved else []
        return ", ".join(where + ([f"which differs in {' and '.join(self.differs)}"] if self.differs else []))

    def __str__(self) -> str:
        """Return `there is 'images/1.PNG', which differs in case`, invisible characters escaped."""
        hidden = {"the coding of accents", "characters that look alike"} & {*self.differs}
        shown = ascii(self.path) if hidden else repr(self.path)
        return f"there is {shown}{', ' if self.difference else ''}{self.difference}"


class Names:
    """Index of paths by how they look, to find the one that was meant."""

    def __init__(self, paths: Iterable[str]) -> None:
        """Index paths with slashes, all relative to the same folder."""
        self._by_look: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        for path in paths:
            look = _look(path.rpartition("/")[2])
            self._by_look.setdefault(look, []).append(path)
            self._by_stem.setdefault(_ENDING[1](look), []).append(path)

    def near(self, text: str, *, elsewhere: bool = True) -> Near | None:
        """Return the path that looks like `text`; if `elsewhere`, also a unique one of its tail."""
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
    """Resolve the paths of rows below a folder."""

    def __init__(self, root: Path) -> None:
        """Set the root; nothing is read yet."""
        self.root = Path(os.path.realpath(root))
        self._names: Names | None = None
        self._composed: dict[Path, dict[str, list[str]]] = {}
        """Names in each folder by their composed (NFC) form."""

    def locate(self, text: str) -> Path:
        """Return the real path that `text` names relative to the folder; the file may not exist.

        Raises:
            OutsideError: for an absolute path, or one that leaves the folder through `..` or a
                link.
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
        """Return the file that a missing path may mean, or None."""
        if self._names is None:
            self._names = Names(islice(_files(self.root), MAX_NAMES))
        return self._names.near(text)

    def _inside(self, text: str) -> Path:
        # realpath, since Path.resolve raises for circular links
        path = Path(os.path.realpath(self.root / text))
        foreign = Path(text).is_absolute() or (PureWindowsPath(text).is_absolute() and not os.path.exists(path))
        if foreign or not path.is_relative_to(self.root):
            raise OutsideError(text)
        return path

    def _as_stored(self, path: Path) -> str:
        """Return the path relative to the root with accents as on disk, if the match is unique."""
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
    """Replace characters by the Latin letters, digits and marks that they look like."""
    return unicodedata.normalize("NFKC", text.translate(_ALIKE))


def visible(text: str) -> str:
    """Strip white space and invisible characters."""
    return _AROUND.sub("", text)


def near_path(path: Path | str) -> str:
    """Suggest what a user's missing path may mean; "" if nothing is similar.

    Example:
        >>> Path("train.jsonl").touch()
        >>> near_path("Train.jsonl")
        "there is 'train.jsonl', which differs in case"
    """
    text = str(path)
    if os.path.exists(text):
        return ""
    for whole in (os.path.expanduser(text), os.path.expandvars(text)):
        if whole != text and os.path.exists(whole):
            return f"the shell did not expand the {text[0]} in it; there is {whole!r}"
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
    """Yield the entries of the folders that match `looks`."""
    for name in _listed(root):
        if len(looks) == 1:
            yield name
        elif _look(name) == looks[0]:
            yield from (f"{name}/{inner}" for inner in _entries(root / name, looks[1:]))


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # missing, not a folder, or not readable
        return []


def _split(text: str) -> list[str]:
    """Split a path as written into components, without scheme, drive and leading dots."""
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
    """Return the smallest subset of `_SIGHTS` and the ending that explains the difference."""

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
