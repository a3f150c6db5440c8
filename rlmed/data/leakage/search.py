"""Find test pictures or whole test rows in the training data: accuracy on such rows says little.

Finds the same file, the same pixels in another file, altered copies (`near_duplicates`) and
neighbouring slices of one series (`series`). docs/data.md says what it finds and what it misses.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlmed.core.types import Example
from rlmed.data.examples import read_examples
from rlmed.data.images import image_sha256, load_image
from rlmed.data.leakage.findings import KINDS, FileLeakage, Leak, LeakageReport, LeakKind
from rlmed.data.leakage.near_duplicates import SAME_IN_CROWD, NearDuplicate, NearDuplicateSearch, thumbnail_correlations
from rlmed.data.leakage.series import neighbours

SLICES_ALIKE = 0.6
"""Least correlation of neighbours' thumbnails; of two chest radiographs in 1000, five reach it."""
_SAME_PIXELS = 0.99
"""Least score for a comparison pixel by pixel."""


def find_leakage(train: Sequence[Example], tests: Mapping[str, Sequence[Example]]) -> LeakageReport:
    """Compare every test picture with every training picture, all of rows that have several.

    Holds test pictures in memory, at 70 KB each; reads training pictures in blocks.

    Args:
        train: training rows.
        tests: test rows by file name.

    Raises:
        BadImageError: for an unreadable image; `read_examples` skips such rows.
    """
    mine = _pictures([example for examples in tests.values() for example in examples])
    theirs = _pictures(train)
    pairs, doubtful = _pair_up(mine, theirs)
    train_rows = _by_picture(train, theirs)
    files: list[FileLeakage] = []
    leaks: list[Leak] = []
    for name, examples in tests.items():
        rows = _by_picture(examples, mine)
        found = [
            _leak(name, pair, mine[pair.test], rows[pair.test], theirs[pair.train], train_rows[pair.train])
            for pair in pairs
            if pair.test in rows
        ]
        found += _same_texts(name, rows[None], train_rows[None])
        found.sort(key=lambda leak: (KINDS.index(leak.kind), -leak.likeness, leak.test_ids, leak.train_ids))
        leaks += found
        files.append(_summary(name, len(examples), rows, found, doubtful))
    return LeakageReport(len(train), len(theirs), tuple(files), tuple(leaks))


def folder_leakage(folder: Path, splits: Sequence[str]) -> LeakageReport | None:
    """Compare splits of a prepared folder: `train…` against the others; None unless it has both.

    Paths in the report are relative to the folder.

    Args:
        folder: holds a JSON Lines file for each split, with usable rows only.
        splits: file names without their suffix.
    """
    training = [name for name in splits if name.startswith("train")]
    if not training or len(training) == len(splits):
        return None
    rows = {name: read_examples(folder / f"{name}.jsonl").examples for name in splits}
    train = [example for name in training for example in rows[name]]
    report = find_leakage(train, {name: examples for name, examples in rows.items() if name not in training})
    return report.relative_to(folder)


@dataclass(frozen=True, slots=True)
class _Picture:
    """One distinct image content, in however many files."""

    digest: str
    paths: tuple[Path, ...]

    def image(self, example: Example) -> tuple[str, str]:
        """Return the row's path of it, and which image that is, as `Leak` has them."""
        number, path = next((number, path) for number, path in enumerate(example.images, 1) if path in self.paths)
        return str(path), f"{number} of {len(example.images)}" if example.more_images else ""


@dataclass(frozen=True, slots=True)
class _Pair:
    """Indices of a matching test picture and training picture."""

    test: int
    train: int
    kind: LeakKind
    likeness: float


def _pictures(examples: Sequence[Example]) -> list[_Picture]:
    paths = sorted({image for example in examples for image in example.images})
    with ThreadPoolExecutor(max_workers=4) as threads:
        digests = list(threads.map(image_sha256, paths))
    by_digest: dict[str, list[Path]] = {}
    for path, digest in zip(paths, digests, strict=True):
        by_digest.setdefault(digest, []).append(path)
    return [_Picture(digest, tuple(group)) for digest, group in by_digest.items()]


def _by_picture(examples: Sequence[Example], pictures: Sequence[_Picture]) -> dict[int | None, list[Example]]:
    """Group rows by the index of each of their pictures; None for those without one."""
    index_of = {path: index for index, picture in enumerate(pictures) for path in picture.paths}
    rows: dict[int | None, list[Example]] = {None: []}
    for example in examples:
        # one picture may be several of a row's images
        for index in dict.fromkeys(index_of[image] for image in example.images) or (None,):
            rows.setdefault(index, []).append(example)
    return rows


def _pair_up(tests: Sequence[_Picture], train: Sequence[_Picture]) -> tuple[list[_Pair], set[int]]:
    """Return each pair with its surest kind, and the indices of doubtful test pictures."""
    if not tests or not train:
        return [], set()
    test_index = {picture.digest: index for index, picture in enumerate(tests)}
    pairs = {
        (test_index[picture.digest], train_index): _Pair(test_index[picture.digest], train_index, "file", 1.0)
        for train_index, picture in enumerate(train)
        if picture.digest in test_index
    }
    near = set(neighbours([picture.paths for picture in tests], [picture.paths for picture in train]))
    search = NearDuplicateSearch([picture.paths[0] for picture in tests])
    search.add([picture.paths[0] for picture in train])
    looks = search.result()
    for found in looks.same:
        key = found.test, found.train
        pairs.setdefault(key, _judge(found, tests[found.test], train[found.train], in_series=key in near))
    slices = sorted(near - pairs.keys())
    likeness = thumbnail_correlations([tests[a].paths[0] for a, _ in slices], [train[b].paths[0] for _, b in slices])
    pairs |= {
        key: _Pair(*key, "slice", round(float(value), 3))
        for key, value in zip(slices, likeness, strict=True)
        if value >= SLICES_ALIKE
    }
    return list(pairs.values()), {found.test for found in looks.doubtful} - {test for test, _ in pairs}


def _judge(found: NearDuplicate, test: _Picture, train: _Picture, *, in_series: bool) -> _Pair:
    """Classify a pair that looks the same."""
    if found.score >= _SAME_PIXELS and _same_pixels(test, train):
        return _Pair(found.test, found.train, "pixels", 1.0)
    # a copy numbered next to its original would be more alike than neighbours are
    kind: LeakKind = "slice" if in_series and found.score < SAME_IN_CROWD else "near"
    return _Pair(found.test, found.train, kind, found.score)


def _same_pixels(left: _Picture, right: _Picture) -> bool:
    return np.array_equal(np.asarray(load_image(left.paths[0])), np.asarray(load_image(right.paths[0])))


_Question = tuple[str, frozenset[str], str]


def _question(example: Example) -> _Question:
    """Return what is asked and answered, regardless of order and case."""
    options = [option.casefold() for option in example.options]
    right = options[example.answer] if example.is_choice else json.dumps(_sorted(example.truth), sort_keys=True)
    right = right.casefold()
    return " ".join(example.question.casefold().split()), frozenset(options), right


def _sorted(truth: Any) -> Any:
    """Return the truth of another task than choice with its texts, or boxes, in order."""
    if isinstance(truth, Mapping):
        return {key: _sorted(value) for key, value in truth.items()}
    if isinstance(truth, list) and not all(isinstance(entry, int | float) for entry in truth):
        return sorted(truth, key=lambda entry: json.dumps(entry, sort_keys=True).casefold())
    return truth


def _leak(
    file: str,
    pair: _Pair,
    test: _Picture,
    rows: Sequence[Example],
    train: _Picture,
    train_rows: Sequence[Example],
) -> Leak:
    (test_image, test_place), (train_image, train_place) = test.image(rows[0]), train.image(train_rows[0])
    asked = {_question(example) for example in train_rows}
    return Leak(
        file=file,
        kind=pair.kind,
        test_image=test_image,
        train_image=train_image,
        likeness=pair.likeness,
        test_ids=tuple(example.id for example in rows),
        train_ids=tuple(example.id for example in train_rows),
        repeated_ids=tuple(example.id for example in rows if _question(example) in asked),
        test_place=test_place,
        train_place=train_place,
    )


def _same_texts(file: str, rows: Sequence[Example], train_rows: Sequence[Example]) -> list[Leak]:
    """Group the rows by question."""
    mine, theirs = _ids_by_question(rows), _ids_by_question(train_rows)
    return [
        Leak(file, "text", None, None, 1.0, ids, theirs[question], ids)
        for question, ids in mine.items()
        if question in theirs
    ]


def _ids_by_question(examples: Sequence[Example]) -> dict[_Question, tuple[str, ...]]:
    ids: dict[_Question, list[str]] = {}
    for example in examples:
        ids.setdefault(_question(example), []).append(example.id)
    return {question: tuple(names) for question, names in ids.items()}


def _summary(
    name: str, count: int, rows: Mapping[int | None, Sequence[Example]], leaks: Sequence[Leak], doubtful: set[int]
) -> FileLeakage:
    kinds: dict[str, LeakKind] = {}
    for leak in leaks:
        for counted in (leak.test_image,) if leak.test_image else leak.test_ids:
            kinds.setdefault(counted, leak.kind)  # the surest kind comes first
    counts = Counter(kinds.values())
    return FileLeakage(
        name=name,
        rows=count,
        images=len(rows.keys() - {None}),
        leaking_rows=len({one for leak in leaks for one in leak.test_ids}),
        repeated_rows=len({one for leak in leaks for one in leak.repeated_ids}),
        images_by_kind={kind: counts[kind] for kind in KINDS if counts[kind]},
        doubtful=len(doubtful & rows.keys()),
    )
