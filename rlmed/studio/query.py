"""Filters of the rollouts page, and the search of an index by them."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize
from urllib.parse import urlencode

from rlmed.studio.index import apart

PAGE = 20
SORTS = {
    "newest": ("step, latest first", "step DESC, id DESC"),
    "oldest": ("step, earliest first", "step, id"),
    "best": ("reward, highest first", "reward DESC, id DESC"),
    "worst": ("reward, lowest first", "reward IS NULL, reward, id"),
    "longest": ("length, longest first", "tokens DESC, id DESC"),
    "shortest": ("length, shortest first", "tokens, id"),
}
"""Label and ORDER BY, by value of `sort`."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Filters:
    """What the reader looks for.

    Example:
        >>> Filters.read({"words": "left lung", "reward_from": "1.5", "page": "2"}).query()
        'words=left+lung&reward_from=1.5'
    """

    words: str = ""
    """All of them occur in question, options or completion, each as the beginning of a word.

    One of a single Latin letter is a whole word; Chinese and Japanese words occur anywhere.
    """
    step_from: int | None = None
    step_to: int | None = None
    reward_from: float | None = None
    reward_to: float | None = None
    task: str = ""
    modality: str = ""
    prompt: str = ""
    """Key of one prompt, see `rlmed.studio.index.prompt_key`."""
    sort: str = "newest"
    page: int = 1

    @classmethod
    def read(cls, given: Mapping[str, str]) -> Filters:
        """Read an address's parameters; what is no number or no order is as if left out."""
        sort = given.get("sort", "")
        prompt = given.get("prompt", "")
        return cls(
            words=given.get("words", "").strip()[:500],
            step_from=_whole(given.get("step_from")),
            step_to=_whole(given.get("step_to")),
            reward_from=_real(given.get("reward_from")),
            reward_to=_real(given.get("reward_to")),
            task=given.get("task", ""),
            modality=given.get("modality", ""),
            prompt=prompt,
            sort=sort if sort in SORTS else "oldest" if prompt else "newest",
            page=max(1, _whole(given.get("page")) or 1),
        )

    def query(self) -> str:
        """Return the address's parameters without the page."""
        named = {name: getattr(self, name) for name in self.__slots__ if name != "page"}
        default = "oldest" if self.prompt else "newest"
        return urlencode({k: v for k, v in named.items() if v not in (None, "") and (k, v) != ("sort", default)})

    @property
    def any(self) -> bool:
        """Whether something is filtered."""
        return any(getattr(self, name) not in (None, "") for name in self.__slots__ if name not in ("sort", "page"))


@dataclass(frozen=True, slots=True)
class Hit:
    """One completion that was found."""

    id: int
    position: int
    """Its place in the group."""
    offset: int
    """Byte at which the group's line begins."""
    line: int
    prompt: str


def search(connection: sqlite3.Connection, filters: Filters) -> tuple[int, list[Hit]]:
    """Return how many completions fit, and those of the page."""
    where, values = _conditions(connection, filters)
    total = connection.execute(f"SELECT count(*) FROM rollouts WHERE {where}", values).fetchone()[0]
    page = min(filters.page, max(1, -(-total // PAGE)))
    order = SORTS[filters.sort][1]
    ids = connection.execute(
        f"SELECT id FROM rollouts WHERE {where} ORDER BY {order} LIMIT ? OFFSET ?", [*values, PAGE, (page - 1) * PAGE]
    ).fetchall()
    found = [
        Hit(*row)
        for (number,) in ids
        for row in connection.execute(
            "SELECT r.id, position, offset, line, prompt FROM rollouts r JOIN groups g ON g.id = group_id WHERE r.id = ?",
            (number,),
        )
    ]
    return total, found


def _conditions(connection: sqlite3.Connection, filters: Filters) -> tuple[str, list[Any]]:
    conditions, values = ["1"], list[Any]()
    if words := _WORD.findall(normalize("NFC", filters.words)):
        # quoted, so that none is an operator of the search; once, for the number and for the page
        connection.execute("CREATE TEMP TABLE IF NOT EXISTS matches (id INTEGER PRIMARY KEY)")
        connection.execute("DELETE FROM matches")
        matching = " ".join(f'"{apart(word)}"{"" if len(word) == 1 and word.isascii() else "*"}' for word in words)
        connection.execute("INSERT INTO matches SELECT rowid FROM texts WHERE texts MATCH ?", (matching,))
        conditions.append("id IN matches")
    elif filters.words:  # signs alone, which the index has none of
        conditions.append("0")
    for name, comparison in (("step", ">="), ("step", "<="), ("reward", ">="), ("reward", "<=")):
        value = getattr(filters, f"{name}_{'from' if comparison == '>=' else 'to'}")
        if value is not None:
            conditions.append(f"{name} {comparison} ?")
            values.append(value)
    for name in ("task", "modality"):
        if getattr(filters, name):
            conditions.append(f"{name} = ?")
            values.append(getattr(filters, name))
    if filters.prompt:
        conditions.append("group_id IN (SELECT id FROM groups WHERE prompt = ?)")
        values.append(filters.prompt)
    return " AND ".join(conditions), values


def kinds(connection: sqlite3.Connection) -> tuple[list[str], list[str]]:
    """Return all tasks and all modalities of the run."""
    found = [
        [value for (value,) in connection.execute(f"SELECT DISTINCT {name} FROM groups ORDER BY 1") if value]
        for name in ("task", "modality")
    ]
    return found[0], found[1]


def of_prompt(connection: sqlite3.Connection, prompt: str) -> list[tuple[int, float | None]]:
    """Return step and mean reward of every group of a prompt, by step."""
    return connection.execute(
        "SELECT step, reward FROM groups WHERE prompt = ? ORDER BY step, id", (prompt,)
    ).fetchall()


def located(connection: sqlite3.Connection, rollout: int) -> tuple[int, int] | None:
    """Return offset and line number of a completion's group; None for a number that is none."""
    found = connection.execute(
        "SELECT offset, line FROM groups WHERE id = (SELECT group_id FROM rollouts WHERE id = ?)", (rollout,)
    ).fetchone()
    return None if found is None else (found[0], found[1])


def _whole(text: str | None) -> int | None:
    try:
        value = int(text or "")
    except ValueError:
        return None
    return value if abs(value) < 2**62 else None


def _real(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e300 else None
