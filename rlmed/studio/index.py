"""An index of a run's rollouts in SQLite, in the user's cache folder; the run is only read.

It holds what rollouts are filtered and sorted by, a full-text index of questions and completions,
and where each group's line lies; what is shown is read from rollouts.jsonl. It is filled from the
byte up to which it has read. A resumed run truncates its file: then the bytes before that place are
others, or gone, and the index starts anew. So it does if the first bytes of the file are others; a
change between the two is not seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from unicodedata import normalize

FORMAT = 3
"""Raise it when the tables change: indexes of another format start anew."""
BATCH = 2**20
"""Bytes of rollouts.jsonl to read at a time; whoever searches waits at most for one of them."""
SEAM = 4096
"""Bytes at the start, and before the place read up to, by which another file is recognized."""
_UNSPACED = re.compile(
    "[\u3005-\u3007\u3041-\u3096\u309d-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003fffd]"
)
"""Characters of scripts without spaces between words: Han, Hiragana and Katakana."""
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_TABLES = """
CREATE TABLE place (offset INTEGER, lines INTEGER, damaged INTEGER, inode TEXT, seam TEXT);
CREATE TABLE groups (
    id INTEGER PRIMARY KEY, offset INTEGER, line INTEGER, step INTEGER, prompt TEXT, task TEXT, modality TEXT, reward REAL
);
CREATE TABLE rollouts (
    id INTEGER PRIMARY KEY, group_id INTEGER, position INTEGER, step INTEGER, reward REAL, tokens INTEGER, task TEXT,
    modality TEXT
);
CREATE INDEX groups_by_prompt ON groups (prompt, step);
CREATE INDEX rollouts_by_group ON rollouts (group_id);
CREATE INDEX rollouts_by_step ON rollouts (step, id);
CREATE INDEX rollouts_by_reward ON rollouts (reward, id);
CREATE INDEX rollouts_by_tokens ON rollouts (tokens, id);
CREATE INDEX rollouts_by_kind ON rollouts (task, modality);
CREATE VIRTUAL TABLE texts USING fts5 (text, content='', detail=full, prefix='2 3', tokenize="unicode61 remove_diacritics 2");
"""


@dataclass(frozen=True, slots=True)
class Place:
    """How far an index has read."""

    offset: int
    """Bytes read, up to the end of a line."""
    size: int
    """Bytes of the file."""
    lines: int
    damaged: int
    """Lines that are no group; they are left out."""
    problem: str = ""
    """Why it reads no further."""

    @property
    def done(self) -> bool:
        """Whether everything but a half-written last line may have been read."""
        return self.offset >= self.size


class Index:
    """The index of one rollouts.jsonl; each thread has its own connection.

    Args:
        rollouts: the file.
        cache: folder for the index, made if missing, readable by this user alone.
    """

    def __init__(self, rollouts: Path, cache: Path) -> None:
        self.rollouts = rollouts
        name = hashlib.sha256(os.fsencode(rollouts.resolve())).hexdigest()[:32]
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = cache / f"{name}-{FORMAT}.sqlite3"
        self.whole = False
        """Whether `update` has reached the end of the file once."""
        self.problem = ""
        """Why it could not be brought up to date when it was last tried."""
        self._lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection, with the tables made.

        A damaged index is removed, at the latest when a statement meets the damage: the next one to
        open it starts anew.

        Raises:
            OSError, sqlite3.OperationalError: if it cannot be reached, or is locked for long; it
                stays as it is.
            sqlite3.DatabaseError: raised by a statement, see `is_damage`.
        """
        try:
            connection = self._connect()
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self.remove()
            connection = self._connect()
        opened = _identity(self.path)
        try:
            yield connection
        except sqlite3.DatabaseError as error:
            connection.close()
            if is_damage(error):
                with self._lock:  # another thread may have been faster
                    if _identity(self.path) == opened:
                        self.remove()
            raise
        finally:
            connection.close()

    def remove(self) -> None:
        """Remove the index."""
        remove_database(self.path)

    def _connect(self) -> sqlite3.Connection:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)  # it holds texts of the run
        os.close(descriptor)
        os.utime(self.path)  # for `remove_old`: reading changes no time
        connection = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA cache_size=-65536")
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'texts'").fetchone() is None:
                connection.execute("BEGIN IMMEDIATE")
                # another process may have been faster
                if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'texts'").fetchone() is None:
                    for statement in _TABLES.split(";\n"):
                        connection.execute(statement)
                    connection.execute("INSERT INTO place VALUES (0, 0, 0, '', '')")
                connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    def place(self, connection: sqlite3.Connection) -> Place:
        """Return how far the index has read."""
        offset, lines, damaged = connection.execute("SELECT offset, lines, damaged FROM place").fetchone()
        size = self.rollouts.stat().st_size if self.rollouts.exists() else 0
        return Place(offset, size, lines, damaged, self.problem)

    def update(self, connection: sqlite3.Connection) -> bool:
        """Read on by at most `BATCH` bytes, or one longer line; return whether there may be more.

        Raises:
            OSError: if the file cannot be read.
        """
        with self.rollouts.open("rb") as file:
            connection.execute("BEGIN IMMEDIATE")  # several processes take turns
            try:
                more = self._read_on(connection, file)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # some errors have ended it
                    connection.execute("ROLLBACK")
                raise
        if not more:
            self.whole = True
        return more

    def _read_on(self, connection: sqlite3.Connection, file: BinaryIO) -> bool:
        offset, lines, damaged, inode, seam = connection.execute("SELECT * FROM place").fetchone()
        stat = os.fstat(file.fileno())
        own = f"{stat.st_dev}:{stat.st_ino}"
        if offset and (inode != own or stat.st_size < offset or _seam(file, offset) != seam):
            for table in ("groups", "rollouts"):
                connection.execute(f"DELETE FROM {table}")
            connection.execute("INSERT INTO texts(texts) VALUES ('delete-all')")
            offset = lines = damaged = 0
            self.whole = False
        file.seek(offset)
        content = file.read(BATCH)
        if content and b"\n" not in content:  # one line longer than a batch
            content += file.readline()
        whole = content[: content.rfind(b"\n") + 1]
        groups = connection.execute("SELECT coalesce(max(id), 0) FROM groups").fetchone()[0]
        rollouts = connection.execute("SELECT coalesce(max(id), 0) FROM rollouts").fetchone()[0]
        batch = _Batch(groups, rollouts)
        start = offset
        for line in _lines(whole):
            lines += 1
            if not batch.add(line, start, lines):
                damaged += 1
            start += len(line)
        batch.write(connection)
        connection.execute(
            "UPDATE place SET offset = ?, lines = ?, damaged = ?, inode = ?, seam = ?",
            (start, lines, damaged, own, _seam(file, start)),
        )
        return bool(whole) and start < stat.st_size


def _lines(content: bytes) -> list[bytes]:
    """Split at newlines alone."""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def remove_database(path: Path) -> None:
    """Remove a database of SQLite, with what it keeps beside."""
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).unlink()


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether an error says that the index is damaged, and not only out of reach."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _seam(file: BinaryIO, offset: int) -> str:
    found = hashlib.sha256()
    for start, end in ((0, min(SEAM, offset)), (max(0, offset - SEAM), offset)):
        file.seek(start)
        found.update(file.read(end - start))
    return found.hexdigest()


class _Batch:
    """Rows of some lines, to be written together."""

    def __init__(self, groups: int, rollouts: int) -> None:
        self._group_id, self._rollout_id = groups, rollouts
        self._groups: list[tuple[Any, ...]] = []
        self._rollouts: list[tuple[Any, ...]] = []
        self._texts: list[tuple[int, str]] = []

    def add(self, line: bytes, offset: int, number: int) -> bool:
        """Add the group of a line; return False for a line that is none."""
        try:
            group = json.loads(line)
            step, completions = _count(group["step"]), group["completions"]
            task, modality = _text(group.get("task", "choice")), _text(group["modality"] or "")
            words = f"{group['question']} {' '.join(str(option) for option in group['options'])}"
            rows = [(*_figures(entry), apart(_text(f"{words} {entry['text']}"))) for entry in completions]
            prompt = prompt_key(group)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return False
        self._group_id += 1
        rewards = [reward for reward, *_ in rows if reward is not None]
        mean = sum(rewards) / len(rewards) if rewards else None
        self._groups.append((self._group_id, offset, number, step, prompt, task, modality, mean))
        for position, (reward, tokens, text) in enumerate(rows):
            self._rollout_id += 1
            row = (self._rollout_id, self._group_id, position, step, reward, tokens, task, modality)
            self._rollouts.append(row)
            self._texts.append((self._rollout_id, text))
        return True

    def write(self, connection: sqlite3.Connection) -> None:
        connection.executemany("INSERT INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?)", self._groups)
        connection.executemany("INSERT INTO rollouts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", self._rollouts)
        connection.executemany("INSERT INTO texts(rowid, text) VALUES (?, ?)", self._texts)


def _figures(entry: Mapping[str, Any]) -> tuple[float | None, int]:
    reward = entry["reward"]
    return None if reward is None else float(reward), _count(entry["tokens"])


def _count(value: Any) -> int:
    """Return an integer that SQLite can hold."""
    if abs(count := int(value)) >= 2**62:
        raise ValueError(f"{count} is too large")
    return count


def _text(value: Any) -> str:
    """Return a text that SQLite can hold: without half surrogate pairs."""
    return str(value).encode("utf-8", "replace").decode()


def apart(text: str) -> str:
    """Return a text as it is searched: composed, characters of Chinese and Japanese apart as words.

    A search for several in a row then finds them anywhere.

    Example:
        >>> apart("左肺 5mm結節")
        ' 左  肺  5mm 結  節 '
    """
    return _UNSPACED.sub(r" \g<0> ", normalize("NFC", text))


def prompt_key(group: Mapping[str, Any]) -> str:
    """Return what the groups of one prompt have in common, as 16 hexadecimal digits."""
    parts = [group["example_id"], group["question"], group["image"]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
