"""Choose the rollouts and evaluated rows that the report shows, and prepare them to be shown."""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rlmed.core.files.jsonlines import parse_line
from rlmed.data.images import BadImageError, load_image
from rlmed.evaluation.records import EvalRow
from rlmed.report.answers import CHOICE, Judge, Judged, judge_of, show_judged, show_notes, show_question, take_apart

GROUPS = 60
ROWS = 60
COMPLETIONS = 8
"""Most distinct completions to show by group."""
GAINED = "wrong → right"
PICTURE_SIDE = 224
FULL_SIZE = 8
"""Most pictures of a question that are shown in full size; of more, each has half the side."""
LONG = 2.5
"""Ratio of sides (also in tasks.html.j2) from which a picture is embedded up to `MAGNIFIED` times
as large, and laid out alone if it is wide.
"""
MAGNIFIED = 4
JPEG_QUALITY = 85


@dataclass(slots=True)
class Pictures:
    """Pictures by path, each embedded once even if several questions show it."""

    uris: list[str] = field(default_factory=list)
    """JPEG as data URI, at most `PICTURE_SIDE` on a side unless it is `LONG`."""
    _embedded: dict[tuple[str, int], Mapping[str, Any] | None] = field(default_factory=dict)

    def add(self, path: str | None, side: int = PICTURE_SIDE) -> Mapping[str, Any] | None:
        """Embed a picture; return its index in `uris`, width, height in pixels; None if missing."""
        if path is None:
            return None
        if (path, side) not in self._embedded:
            self._embedded[path, side] = self._embed(Path(path), side)
        return self._embedded[path, side]

    def add_all(self, paths: Sequence[str | None]) -> list[Mapping[str, Any] | None]:
        """Embed the pictures of a question, in order; as `add`, but small if there are many."""
        given = [path for path in paths if path is not None]
        side = PICTURE_SIDE if len(given) <= FULL_SIZE else PICTURE_SIDE // 2
        return [self.add(path, side) for path in given]

    def _embed(self, path: Path, side: int) -> Mapping[str, Any] | None:
        try:
            image = load_image(path, max_side=side)
            ratio = max(image.size) / min(image.size)
            if ratio > LONG:  # a strip of few pixels would show nothing
                image = load_image(path, max_side=round(side * min(ratio / LONG, MAGNIFIED)))
        except BadImageError:
            return None
        target = io.BytesIO()
        image.save(target, "JPEG", quality=JPEG_QUALITY)
        self.uris.append("data:image/jpeg;base64," + base64.b64encode(target.getvalue()).decode())
        return {"index": len(self.uris) - 1, "width": image.width, "height": image.height}


def show_groups(rollouts: Path, pictures: Pictures) -> list[dict[str, Any]]:
    """Return groups for the template: best and worst alternating, then some from the whole run.

    Each task has its share, since rewards of two tasks do not compare.

    Args:
        rollouts: rollouts.jsonl, which may exceed memory.
        pictures: collects the pictures.
    """
    entries = _entries(rollouts)
    shown = []
    with rollouts.open("rb") if entries else io.BytesIO() as file:
        for pick, (_, _, offset, number) in _choose_of_each(entries):
            file.seek(offset)
            shown.append(_show_group(parse_line(file.readline(), rollouts, number), pick, pictures))
    return shown


_Entry = tuple[float | None, int, int, int]
"""Mean reward (None if all are missing), step, byte offset and line number of a group."""


def _entries(rollouts: Path) -> Mapping[str, list[_Entry]]:
    """Return all groups by task."""
    entries: dict[str, list[_Entry]] = defaultdict(list)
    if not rollouts.exists():
        return entries
    offset = 0
    with rollouts.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # still being written
                break
            group = parse_line(line, rollouts, number)
            entries[str(group.get("task", CHOICE))].append((_mean_reward(group), group["step"], offset, number))
            offset += len(line)
    return entries


def _mean_reward(group: Mapping[str, Any]) -> float | None:
    rewards = [entry["reward"] for entry in group["completions"] if entry["reward"] is not None]
    return sum(rewards) / len(rewards) if rewards else None


def _choose_of_each(entries: Mapping[str, Sequence[_Entry]]) -> list[tuple[str, _Entry]]:
    """Choose at most `GROUPS`, as many of each task, taking turns."""
    most = max(1, GROUPS // max(1, len(entries)))
    turns = zip_longest(*(_choose(of_task, most) for of_task in entries.values()))
    return [chosen for turn in turns for chosen in turn if chosen is not None][:GROUPS]


def _choose(entries: Sequence[_Entry], most: int) -> list[tuple[str, _Entry]]:
    """Choose a third each: best, worst (late ties first) and evenly over the run; none twice.

    Best and worst alternate, so that the first page shows both. A group without any reward is
    neither.
    """
    third = -(-min(most, len(entries)) // 3)
    ranked = sorted((-entry[0], -entry[1], entry[2], entry) for entry in entries if entry[0] is not None)
    best = [entry for *_, entry in ranked[:third]]
    upwards = sorted((-negative, step, offset, entry) for negative, step, offset, entry in ranked[third:])
    worst = [entry for *_, entry in upwards[:third]]
    rest = sorted(set(entries) - {*best, *worst}, key=lambda entry: entry[2])
    count = min(len(rest), most - len(best) - len(worst))
    spread = [rest[i * len(rest) // count] for i in range(count)]
    turns = [
        entry for pair in zip_longest([("best", p) for p in best], [("worst", p) for p in worst]) for entry in pair
    ]
    return [entry for entry in turns if entry is not None] + [("run", entry) for entry in spread]


def _show_group(group: Mapping[str, Any], pick: str, pictures: Pictures) -> dict[str, Any]:
    task = str(group.get("task", CHOICE))
    completions = _merge(group, task)
    # the template folds completions after the third, so move the worst forward
    ordered = [*completions[:2], *completions[-1:], *completions[2:-1]] if len(completions) > 3 else completions
    correct = sum(entry["count"] for entry in completions if entry["correct"])
    judged = all(entry["correct"] is not None for entry in completions)
    total = len(group["completions"])
    outcome = "all right" if correct == total else "some right" if correct else "none right"
    return {
        **{key: group[key] for key in ("step", "index", "example_id", "question", "modality")},
        # 0.1 wrote kind
        "question_type": group["question_type" if "question_type" in group else "kind"],
        "pick": pick,
        **show_question(task, group["options"], group["answer"], group.get("truth")),
        # earlier versions knew one picture a question
        "pictures": pictures.add_all([group["image"], *group.get("more_images", ())]),
        "reward": _mean_reward(group),
        "correct": correct,
        "total": total,
        "outcome": outcome if judged else "not judged",
        "completions": ordered[:COMPLETIONS],
        "hidden": len(ordered[COMPLETIONS:]),
    }


def _merge(group: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Sort completions best first, merging equal texts with equal rewards into one with a count."""
    counts: Counter[str] = Counter()
    merged: dict[str, dict[str, Any]] = {}
    judge = None if task == CHOICE else judge_of(group)
    for entry in group["completions"]:
        notes = show_notes(entry)
        key = repr((entry["text"], entry["reward"], entry["reward_parts"], entry["finish_reason"], notes))
        counts[key] += 1
        if key in merged:
            continue
        merged[key] = show_completion(group, entry, judge)
    shown = [{**entry, "count": counts[key]} for key, entry in merged.items()]
    return sorted(shown, key=lambda entry: -(entry["reward"] if entry["reward"] is not None else float("-inf")))


def show_completion(group: Mapping[str, Any], entry: Mapping[str, Any], judge: Judge | None) -> dict[str, Any]:
    """Return a completion of a recorded group for the template.

    Args:
        group: a line of rollouts.jsonl.
        entry: one of its completions.
        judge: from `judge_of`; None for multiple choice.
    """
    if judge is None:
        taken = take_apart(entry["text"], group["answer"])
    else:
        taken = show_judged(entry["text"], judge(entry["text"]), group.get("truth"))
    return {**entry, **taken, "notes": show_notes(entry)}


def show_rows(before: Sequence[EvalRow], after: Sequence[EvalRow], pictures: Pictures) -> list[dict[str, Any]]:
    """Return evaluated rows for the template, without controls.

    Args:
        before: rows of the first evaluation; empty if there is only one.
        after: rows of the last one.
        pictures: collects the pictures.

    Returns:
        Rows whose answer changed from wrong to right or back; with one evaluation, right and wrong
        rows. Every file, task and outcome has its share of at most `ROWS` rows.
    """
    earlier = {(row.file, row.id): row for row in before if row.control == "none"}
    piles: dict[tuple[str, str, str], list[tuple[EvalRow | None, EvalRow]]] = defaultdict(list)
    for row in after:
        old = earlier.get((row.file, row.id))
        if row.control != "none" or (before and (old is None or old.correct == row.correct)):
            continue
        outcome = "right" if row.correct else "wrong"
        change = outcome if old is None else f"{'right' if old.correct else 'wrong'} → {outcome}"
        piles[row.file, change, row.task].append((old, row))
    share = ROWS // max(1, len(piles))
    return [
        {
            "file": file,
            "outcome": outcome,
            "of": len(pile),
            "id": row.id,
            "question_type": row.question_type,
            "question": row.question,
            **show_question(row.task, row.options, row.answer, row.truth),
            "pictures": pictures.add_all(row.images),
            "answers": [show_answer(one) for one in (old, row) if one is not None],
        }
        for (file, outcome, _), pile in sorted(
            piles.items(), key=lambda item: (item[0][1] != GAINED, item[0][1], item[0][0], item[0][2])
        )
        for old, row in pile[: max(1, share)]
    ]


def show_answer(row: EvalRow) -> dict[str, Any]:
    """Return an evaluated completion for the template."""
    if row.task == CHOICE:
        taken = take_apart(row.completion, row.answer)
    else:
        taken = show_judged(row.completion, Judged(row.predicted, row.correct, row.scores), row.truth)
    return {**taken, "notes": {}, "tokens": row.tokens, "finish_reason": row.finish_reason}
