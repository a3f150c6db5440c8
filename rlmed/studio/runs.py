"""Find run folders and say what each is, how far it got and whether it still runs.

Only files are read; a run's lock is neither taken nor tested. Symbolic links are not followed: what
lies outside of the given folders is no run here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rlmed.core.files.exclusive import HELD_FILE, OWNER_FILE
from rlmed.core.files.ownership import Owner
from rlmed.core.tracing import TIMELINE_LINES
from rlmed.evaluation.results import SUMMARY_FILE, EvalSummary, evaluation_folders
from rlmed.recording.inputs import CONFIG_FILE, VERSIONS_FILE
from rlmed.recording.recorder import METRICS_FILE, REFUSED_FILE, ROLLOUTS_FILE
from rlmed.report.headline import WINDOW, headline
from rlmed.report.page import MOST_CONFIG, REPORT_FILE
from rlmed.studio.tails import last_line, lines_backwards

State = Literal["running", "finished", "refused", "stopped", "killed", "silent"]
STATES: dict[State, str] = {
    "running": "its process lives, or its files changed within the last minute",
    "finished": "it has written its report",
    "refused": "its preflight refused to start it: nothing could have been learnt",
    "stopped": "it ended before it was done",
    "killed": "its process is gone and left its mark",
    "silent": "it runs on another machine, or did; nothing was written for ten minutes",
}
EVALUATIONS = "evaluations"
DEPTH = 4
"""Levels below a given folder that are searched."""
SKIPPED = {"checkpoints", EVALUATIONS, "tensorboard", "batches", "bad_steps", "images", "wandb", "mlruns"}
"""Folders of a run, and of data, that hold no runs."""
FRESH_S = 60.0
SILENT_S = 600.0
RESCAN_S = 2.0
"""Seconds for which a list of runs is used again."""
_MARKS = ({CONFIG_FILE, VERSIONS_FILE}, {CONFIG_FILE, EVALUATIONS}, {".hydra", OWNER_FILE})
"""Names that together mark a run's folder; the last are those of one that has just started."""
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading damaged files may raise, a folder's whose content nobody vouches for."""
MOST_REASON = 2000
"""Characters of a refusal that are shown."""
_LAST_MOMENT = 253_370_764_800.0
"""The year 9999: a file may state a later time, which no calendar shows."""
_STEPS = re.compile(rb"^steps: (\d{1,9})\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder below one of the studio's folders."""

    name: str
    """Unique among the studio's runs, in characters that can be shown."""
    folder: Path

    def file(self, name: str) -> Path:
        """Return the path of a file or folder of the run.

        One that leads elsewhere, or is neither (a pipe would be waited for), is as if missing.
        """
        path = self.folder / name
        try:
            inside = path.resolve().is_relative_to(self.folder)
            mode = path.stat().st_mode
        except FileNotFoundError:
            return path if inside else self.folder / ".elsewhere"
        except (OSError, RuntimeError):  # the latter for a link that leads to itself
            return self.folder / ".elsewhere"
        return path if inside and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) else self.folder / ".elsewhere"

    def evaluations(self) -> list[Path]:
        """Return the folders of its evaluations that have a summary, by step."""
        return [
            folder
            for folder in evaluation_folders(self.file(EVALUATIONS))
            if self.file(f"{EVALUATIONS}/{folder.name}/{SUMMARY_FILE}").is_file()
        ]


@dataclass(frozen=True, slots=True)
class Glance:
    """What the list shows of a run, read from the ends of its files."""

    run: Run
    kind: str
    """"train", "sft", "evaluate", "reliability" or "starting"."""
    state: State
    steps: int
    planned: int | None
    reward: float | None
    """Mean over the last steps, see `rlmed.report.headline`."""
    loss: float | None
    accuracy: float | None
    """Mean over the files of the last evaluation."""
    started: float
    """Seconds since 1970: the time of its oldest file."""
    written: float
    """Time of the last write, likewise."""
    refused: str = ""
    """Why its preflight refused to start it; "" if it did not."""


class Runs:
    """All runs below the given folders."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)
        self._lock = threading.Lock()
        self._found: dict[str, Run] = {}
        self._searched = float("-inf")
        self._glances: dict[Path, tuple[Any, Glance]] = {}

    def all(self) -> list[Run]:
        """Return the runs, by name."""
        with self._lock:
            if time.monotonic() - self._searched > RESCAN_S:
                self._found = {run.name: run for run in self._search()}
                self._searched = time.monotonic()
            return list(self._found.values())

    def named(self, name: str) -> Run | None:
        """Return the run that the list calls `name`; None for any other name."""
        return next((run for run in self.all() if run.name == name), None)

    def stamp(self, run: Run) -> str:
        """Return a text that changes when the run writes, or its state changes."""
        return f"{hash((self.glance(run).state, _stamp(run))) & 0xFFFFFFFFFFFFFFFF:016x}"

    def glances(self) -> list[Glance]:
        """Return a glance at each run, the latest written first."""
        return sorted((self.glance(run) for run in self.all()), key=lambda one: -one.written)

    def glance(self, run: Run) -> Glance:
        """Return a glance at a run; what did not change since the last one is not read again."""
        seen = _stamp(run)
        kept = self._glances.get(run.folder)
        if kept is not None and kept[0] == seen:
            known = kept[1]
        else:
            try:
                known = _look(run)
            except DAMAGE:  # one run shall not hide the others
                known = Glance(run, "starting", "stopped", 0, None, None, None, None, *_times(run))
            self._glances[run.folder] = seen, known
        return _with_state(known)

    def _search(self) -> Iterator[Run]:
        several = len(self._folders) > 1
        names: set[str] = set()
        folders: set[Path] = set()
        for top, label in zip(self._folders, labels(self._folders), strict=True):
            for folder in _run_folders(top, DEPTH):
                inner = shown(folder.relative_to(top).as_posix())
                name = label if inner == "." else f"{label}/{inner}" if several else inner
                if name in names:  # of a folder that is a run itself, and holds one of its own name
                    name = shown(str(folder))
                if folder not in folders:  # one of the given folders may lie in another
                    names.add(name)
                    folders.add(folder)
                    yield Run(name, folder)


def labels(folders: Sequence[Path]) -> list[str]:
    """Return a name for each folder: as much of the end of its path as tells it from the others.

    Example:
        >>> labels([Path("/data/ann/outputs"), Path("/data/bob/outputs"), Path("/scratch")])
        ['ann/outputs', 'bob/outputs', 'scratch']
    """
    parts = [tuple(shown(part) for part in folder.parts if part != folder.anchor) for folder in folders]
    taken = [1] * len(folders)
    while True:
        ends = ["/".join(all_parts[-count:]) for all_parts, count in zip(parts, taken, strict=True)]
        # one that begins with another could be that one's run
        alike = {
            place
            for place, end in enumerate(ends)
            for other, its in enumerate(ends)
            if place != other and f"{its}/".startswith(f"{end}/")
            for place in (place, other)
        }
        longer = [place for place in alike if taken[place] < len(parts[place])]
        if not longer:
            return [end or "run" for end in ends]
        for place in longer:
            taken[place] += 1


def shown(name: str) -> str:
    """Return a file name in characters that can be encoded: bytes that are no UTF-8 as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError:  # not readable, or just removed
        return
    names = {entry.name for entry in inside}
    if METRICS_FILE in names or any(marks <= names for marks in _MARKS):
        yield folder
    if depth:
        for entry in inside:
            if not entry.name.startswith(".") and entry.name not in SKIPPED and entry.is_dir(follow_symlinks=False):
                yield from _run_folders(folder / entry.name, depth - 1)


def _stamp(run: Run) -> tuple[Any, ...]:
    """Return what changes when the run writes."""
    names = (
        METRICS_FILE,
        CONFIG_FILE,
        EVALUATIONS,
        REPORT_FILE,
        ROLLOUTS_FILE,
        TIMELINE_LINES,
        OWNER_FILE,
        HELD_FILE,
        REFUSED_FILE,
    )
    stats = (_stat(run.folder / name) for name in names)
    return tuple(None if one is None else (one.st_mtime_ns, one.st_size, one.st_ino) for one in stats)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _look(run: Run) -> Glance:
    last = last_line(run.file(METRICS_FILE)) or {}
    steps = last.get("step")
    evaluations = run.evaluations()
    rewarded = any(name.startswith("reward/") for name in last)
    kind = "train" if rewarded or run.file(ROLLOUTS_FILE).exists() else "sft" if last else "starting"
    refused = _refusal(run) if kind == "starting" else ""
    if refused:
        kind = "train"
    elif kind == "starting" and evaluations:
        kind = "reliability" if (evaluations[-1] / "reliability.json").is_file() else "evaluate"
    started, written = _times(run)
    return Glance(
        run=run,
        kind=kind,
        state="stopped",
        steps=steps if isinstance(steps, int) else 0,
        planned=_planned(run) if kind in ("train", "starting") else None,
        reward=_reward(run.file(METRICS_FILE)),
        loss=_number(last.get("loss")),
        accuracy=_accuracy(evaluations),
        started=started,
        written=written,
        refused=refused,
    )


def _refusal(run: Run) -> str:
    """Return why a run's preflight refused to start it: the file's first line; "" if it did not."""
    try:
        with run.file(REFUSED_FILE).open(encoding="utf-8", errors="replace") as file:
            return file.readline(MOST_REASON).strip()
    except OSError:
        return ""


def _reward(metrics: Path) -> float | None:
    """Return the mean reward as the run's page and its report show it."""
    found = (line for line in lines_backwards(metrics) if _number(line.get("reward/mean")) is not None)
    ends = headline(list(islice(found, 2 * WINDOW))[::-1], "reward/mean")
    return None if ends is None else ends.end


def _times(run: Run) -> tuple[float, float]:
    """Return when a run started and last wrote."""
    times = [
        min(max(one.st_mtime, 0.0), _LAST_MOMENT) for entry in _entries(run.folder) if (one := _stat(entry)) is not None
    ]
    return min(times, default=0.0), max(times, default=0.0)


def _entries(folder: Path) -> list[Path]:
    """Return the files and folders whose times say when a run started and last wrote."""
    try:
        # the report may be written again at any time
        names = [name for name in os.listdir(folder) if name != REPORT_FILE]
    except OSError:
        return []
    return [folder / name for name in names]


def _with_state(known: Glance) -> Glance:
    state = _state(known)
    return known if state == known.state else dataclasses.replace(known, state=state)


def _state(known: Glance) -> State:
    run, written = known.run, known.written
    quiet = abs(time.time() - written)  # the clock may have been set back
    owner = _owner(run)
    if owner is not None:
        living = owner.living
        if living is None:
            return "running" if quiet < SILENT_S else "silent"
        return "running" if living else "killed"
    if (run.folder / OWNER_FILE).exists() or (run.folder / HELD_FILE).exists():  # just being written
        return "running" if quiet < SILENT_S else "silent"
    report, metrics = _stat(run.folder / REPORT_FILE), _stat(run.folder / METRICS_FILE)
    if report is not None and (metrics is None or report.st_mtime >= metrics.st_mtime):
        return "finished"
    if known.refused:
        return "refused"
    return "running" if quiet < FRESH_S else "stopped"


def _owner(run: Run) -> Owner | None:
    """Return the process that holds the folder, as its card says; None without a readable card."""
    for name in (OWNER_FILE, HELD_FILE):
        try:
            card = json.loads(run.file(name).read_bytes())
            owner = Owner(str(card["machine"]), int(card["pid"]), int(card["start"]))
        except DAMAGE:
            continue
        if 0 < owner.pid < 2**31:  # others the system cannot be asked for
            return owner
    return None


def _planned(run: Run) -> int | None:
    try:
        with run.file(CONFIG_FILE).open("rb") as file:
            found = _STEPS.search(file.read(MOST_CONFIG))
    except OSError:
        return None
    return int(found[1]) if found else None


def _accuracy(evaluations: Sequence[Path]) -> float | None:
    if not evaluations:
        return None
    try:
        return EvalSummary.read(evaluations[-1]).mean_accuracy
    except DAMAGE:  # damaged: its own page says so
        return None


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None
