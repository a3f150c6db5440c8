"""Read files in COCO's format (Lin et al. 2014, arXiv 1405.0312): boxes of categories in images.

A file is `{"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
"annotations": [{"image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"}]}`, all boxes
in pixels. There is one question for each image and category that it has, and on demand some for
categories that it lacks, whose answer is that there is nothing to find.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlmed.core.files.litter import litter_clause, sift
from rlmed.core.files.near_paths import near_path
from rlmed.data.examples import BadRowError, shorten
from rlmed.data.images import BadImageError
from rlmed.data.readers.base import Option, Reader, Skipped, SourceRow
from rlmed.data.readers.boxes import corners
from rlmed.data.readers.formats.image_files import Images, images_of
from rlmed.data.readers.formats.table import SPLIT, file_split

SLOT = "{category}"
QUESTION = f"Which part of the image shows {SLOT}?"
CROWD = "one of its boxes holds a crowd (iscrowd), not an object"
Group = dict[Hashable, list[Mapping[str, Any]]]
"""Annotations of an image by category."""


def read(
    source: Path,
    *,
    question: str = QUESTION,
    absent: int = 0,
    seed: int = 0,
    modality: str = "",
    images: Path | None = None,
    split: str | None = None,
) -> Iterator[SourceRow | Skipped]:
    """Yield a row for each image and category; a file's name is that of its split.

    Args:
        source: a file, or a folder of them.
        question: its text, with `{category}` where the name goes.
        absent: categories that an image lacks to ask for, too.
        seed: of the choice of these.
        modality: of all images.
        images: folder or archive that file names are relative to; default: the file's folder.
        split: of all rows.

    Raises:
        ValueError: for a source that is not in this format, or a question without `{category}`.
    """
    if SLOT not in question:
        raise ValueError(f"--question {question!r} has no {SLOT}, where the name of a category goes")
    if absent < 0 or seed < 0:
        raise ValueError(f"--absent {absent} and --seed {seed} must not be negative")
    for path in _files(source):
        content = _content(path)
        found = images_of(images, path.parent)
        names = {entry["id"]: _name(entry, path) for entry in content["categories"]}
        groups = _grouped(content["annotations"])
        for image_id in sorted(groups.keys() - {entry["id"] for entry in content["images"]}, key=str):
            yield Skipped(
                f"annotations of {path.name}",
                str(image_id),
                f"their image {image_id!r} is not in the file's list of images",
            )
        for number, entry in enumerate(content["images"]):
            where, row_id = f"image {number} of {path.name}", str(entry["id"])
            group = groups.get(entry["id"], {})
            lacking = [category for category in names if category not in group]
            rng = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "little")])
            drawn = [lacking[index] for index in rng.permutation(len(lacking))[:absent]]
            for category in (*group, *drawn):
                yield _row(
                    entry,
                    names.get(category),
                    group.get(category, []),
                    question=question,
                    where=where,
                    row_id=f"{row_id}-{category}",
                    split=split or file_split(path),
                    images=found,
                    modality=modality,
                )


def _row(
    entry: Mapping[str, Any],
    category: str | None,
    annotations: Sequence[Mapping[str, Any]],
    *,
    question: str,
    where: str,
    row_id: str,
    split: str,
    images: Images,
    modality: str,
) -> SourceRow | Skipped:
    try:
        if category is None:
            raise BadRowError(f"its category {row_id.rpartition('-')[2]} is not in the file's list of categories")
        if any(annotation.get("iscrowd") for annotation in annotations):
            return Skipped(where, row_id, CROWD, chosen=True)
        name, size = entry.get("file_name"), (entry.get("width"), entry.get("height"))
        if not isinstance(name, str):
            raise BadRowError(f"its file_name is {shorten(name)}, not a path")
        known = size if all(type(side) is int for side in size) else None
        return SourceRow(
            where=where,
            split=split,
            id=row_id,
            question=question.replace(SLOT, category),
            options=(),
            answer=[corners(annotation.get("bbox"), known) for annotation in annotations],  # type: ignore[arg-type]
            image=images.find(name),
            modality=modality,
            kind=category,
            task="grounding",
        )
    except (BadRowError, BadImageError) as error:
        return Skipped(where, row_id, str(error))


def _grouped(annotations: Sequence[Mapping[str, Any]]) -> dict[Hashable, Group]:
    """Return annotations by image and category, in the order of the file."""
    groups: dict[Hashable, Group] = defaultdict(lambda: defaultdict(list))
    for annotation in annotations:
        groups[annotation["image_id"]][annotation["category_id"]].append(annotation)
    return groups


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    paths, litter = sift(source.glob("*.json"), source)
    if not paths:
        raise ValueError(f"folder {source} holds no .json file{litter_clause(litter)}: give the path of one")
    return paths


def _content(path: Path) -> Mapping[str, list[Mapping[str, Any]]]:
    """Return a file's content, whose three lists hold objects with plain ids.

    Raises:
        ValueError: for anything else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        near = near_path(path) or "give the path of a JSON file"
        raise ValueError(f"file {path} cannot be read: {error.strerror}; {near}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"file {path} is not valid JSON ({error}); copy it again") from error
    for name in ("images", "annotations", "categories"):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(
                f"file {path} has no list {name!r} of objects: it is not in COCO's format (images, annotations, categories)"
            )
        keys = ("image_id", "category_id") if name == "annotations" else ("id",)
        for number, entry in enumerate(entries):
            if bad := [key for key in keys if type(entry.get(key)) not in (int, str)]:
                raise ValueError(f"file {path}: element {number} of {name!r} has no {bad[0]}, a number or text")
        ids = [entry["id"] for entry in entries] if name != "annotations" else []
        if len(set(ids)) < len(ids):
            repeated = next(value for value in ids if ids.count(value) > 1)
            raise ValueError(f"file {path} has two {name} with the id {repeated!r}: ids must differ")
    return dict(content)


def _name(entry: Mapping[str, Any], path: Path) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"file {path}: category {entry['id']!r} has the name {shorten(name)}: give it a text")
    return name.strip()


READER = Reader(
    name="coco",
    title="boxes in COCO's format: a JSON file of images, annotations and categories",
    read=read,
    options=(
        Option("--question", {"metavar": "TEXT", "help": f"with {SLOT} in it (default: {QUESTION})"}),
        Option(
            "--absent", {"type": int, "metavar": "N", "help": "categories to ask for that an image lacks (default: 0)"}
        ),
        Option("--seed", {"type": int, "help": "of the choice of these (default: 0)"}, needs="--absent"),
        Option("--modality", {"metavar": "NAME", "help": "of all images, for example X-ray"}),
        Option(
            "--images", {"type": Path, "metavar": "PATH", "help": "folder (or .zip) that file names are relative to"}
        ),
        SPLIT,
    ),
)
