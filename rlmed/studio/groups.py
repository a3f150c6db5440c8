"""Recorded groups: read one by its place, prepare some of its completions for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmed.core.files.jsonlines import parse_line
from rlmed.report.answers import CHOICE, judge_of, show_question
from rlmed.report.rollouts import show_completion
from rlmed.studio.pictures import Pictures
from rlmed.studio.query import Hit
from rlmed.studio.runs import DAMAGE


def read_group(rollouts: Path, offset: int, line: int) -> dict[str, Any]:
    """Return the group whose line begins at a byte of rollouts.jsonl.

    Raises:
        OSError, ValueError: if it is no longer there.
    """
    with rollouts.open("rb") as file:
        file.seek(offset)
        return parse_line(file.readline(), rollouts, line)


def images_of(group: Mapping[str, Any]) -> list[str]:
    """Return the paths of the pictures of a group's question, in order."""
    # earlier versions knew one picture a question
    return [path for path in (group["image"], *group.get("more_images", ())) if isinstance(path, str)]


def show_hits(rollouts: Path, hits: Sequence[Hit], pictures: Pictures) -> list[dict[str, Any]]:
    """Return cards for the template: neighbours of one group share a card.

    A group that is no longer there, because the run was resumed meanwhile, is left out.
    """
    cards: list[dict[str, Any]] = []
    last: tuple[int, Mapping[str, Any]] | None = None
    for hit in hits:
        try:
            if last is None or last[0] != hit.offset:
                group = read_group(rollouts, hit.offset, hit.line)
                card = _card(group, hit, pictures)
                last = hit.offset, group
                cards.append(card)
            shown = _completion(last[1], hit)
        except DAMAGE:
            last = None
            continue
        cards[-1]["completions"].append(shown)
    return [card for card in cards if card["completions"]]


def _card(group: Mapping[str, Any], hit: Hit, pictures: Pictures) -> dict[str, Any]:
    task = str(group.get("task", CHOICE))
    return {
        **{key: group[key] for key in ("step", "index", "example_id", "question", "modality")},
        # 0.1 wrote kind
        "question_type": group["question_type" if "question_type" in group else "kind"],
        **show_question(task, group["options"], group["answer"], group.get("truth")),
        "images": pictures.describe(images_of(group)),
        "rollout": hit.id,
        "prompt": hit.prompt,
        "of": len(group["completions"]),
        "completions": [],
    }


def _completion(group: Mapping[str, Any], hit: Hit) -> dict[str, Any]:
    judge = None if str(group.get("task", CHOICE)) == CHOICE else judge_of(group)
    return {**show_completion(group, group["completions"][hit.position], judge), "count": 1, "number": hit.position + 1}
