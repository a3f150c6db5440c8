"""Write the files of a prepared data set; checks every row the way it will be read back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, TextIO

from PIL import Image

from rlmed.core.files.atomic import refusal
from rlmed.core.files.near_paths import Folder
from rlmed.core.types import Example
from rlmed.data.examples import BadRowError, check_image_count, image_name, parse_row, shorten
from rlmed.data.images import BadImageError, check_contrast, check_encoded, check_image, check_image_size, image_sha256
from rlmed.data.options.choices import written_answer
from rlmed.data.options.order import kept_orders
from rlmed.data.prepare.summaries import Priors, SplitSummary, TaskCounter
from rlmed.data.readers.base import Encoded, Picture, Skipped, SourceImage, SourceRow
from rlmed.data.rows import grouped

MAX_SPLITS = 64
MAX_IMAGE_BYTES = 2**30
"""Largest image file that is copied: no picture of `MAX_PIXELS` pixels needs more."""
MAX_ID = 200
"""Most characters of an id."""
MAX_REASON = 1000
"""Most characters of a skipped row's location and reason."""
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")
_HASH_LENGTH = 20
"""SHA-256 hexadecimal digits in an image's name: 80 bits, so that no two of a million collide."""


class ImageWriter:
    """Copies each image into the prepared data once."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.hashes: dict[str, str] = {}
        """SHA-256 by path in the prepared data."""
        self._folder, self._source = folder, source
        self._seen: dict[object, str | BadImageError] = {}
        self._new: set[str] = set()
        """Images that the last row brought."""

    def add(self, image: SourceImage) -> str:
        """Copy the image and return its path in the prepared data. Raises BadImageError."""
        key = image if isinstance(image, Path) else (type(image), image.key)
        if isinstance(image, Encoded) and not image.key:
            return self._put(image)
        if key not in self._seen:
            try:
                self._seen[key] = self._write(image)
            except BadImageError as error:
                self._seen[key] = error
        found = self._seen[key]
        if isinstance(found, BadImageError):
            raise found
        return found

    def add_all(self, images: Sequence[SourceImage]) -> list[str]:
        """Copy a row's images and return their paths in the prepared data, in order.

        Raises:
            BadImageError: for the first that cannot be used, which it names among several; none of
                the row's own images stays then.
        """
        names: list[str] = []
        self._new = set()
        for number, image in enumerate(images, start=1):
            before = len(self.hashes)
            try:
                names.append(self.add(image))
            except BadImageError as error:
                self.take_back()
                if len(images) == 1:
                    raise
                raise BadImageError(f"its {image_name(number, len(images))}: {error}") from None
            if len(self.hashes) > before:
                self._new.add(names[-1])
        return names

    def take_back(self) -> None:
        """Remove the images that the last row brought, which no other row shows."""
        if not self._new:
            return
        self._seen = {key: found for key, found in self._seen.items() if found not in self._new}
        for name in self._new:
            del self.hashes[name]
            with writing(self._folder / name):
                (self._folder / name).unlink()
        self._new = set()

    def _write(self, image: SourceImage) -> str:
        if isinstance(image, Picture):
            return self._save(image)
        return self._copy(image) if isinstance(image, Path) else self._put(image)

    def _copy(self, path: Path) -> str:
        if path.is_file() and path.stat().st_size > MAX_IMAGE_BYTES:
            raise BadImageError(f"image {path.name} has {path.stat().st_size} bytes, more than {MAX_IMAGE_BYTES}")
        try:
            check_image(path)
            sha256 = image_sha256(path)
        except BadImageError as error:
            # the manifest may be shared: it names files relative to the source
            raise BadImageError(str(error).replace(str(path), _short(path, self._source))) from None
        name = _file_name(sha256, path)
        if name not in self.hashes:
            with writing(self._folder / name):
                shutil.copyfile(path, self._folder / name)
            self.hashes[name] = sha256
        return name

    def _put(self, image: Encoded) -> str:
        content = image.load()
        check_encoded(content, image.name)
        sha256 = hashlib.sha256(content).hexdigest()
        name = _file_name(sha256, PurePath(image.name))
        if name not in self.hashes:
            with writing(self._folder / name):
                (self._folder / name).write_bytes(content)
            self.hashes[name] = sha256
        return name

    def _save(self, picture: Picture) -> str:
        if not _KEY.fullmatch(picture.key):
            raise ValueError(f"picture key {picture.key!r} must be 1 to 100 letters, digits, - or _")
        image = picture.load()
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"picture {picture.key} has mode {image.mode}; it must be L or RGB")
        name = f"images/{picture.key}.png"
        check_image_size(name, image.size)
        check_contrast(f"picture {picture.key}", image)
        # pixels only: drop everything else the image carries
        bare = Image.frombytes(image.mode, image.size, image.tobytes())
        with writing(self._folder / name):
            bare.save(self._folder / name, format="PNG")
        self.hashes[name] = image_sha256(self._folder / name)
        return name


class _Split:
    """A JSON Lines file being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sources: dict[str, str] = {}
        """Where in the source each row was, by id."""
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._digest = hashlib.sha256()
        self._images: set[str] = set()
        self._choice_images: set[str] = set()
        self._by_modality: Counter[str] = Counter()
        self._by_kind: Counter[str] = Counter()
        self._by_task: Counter[str] = Counter()
        self._tasks: dict[str, TaskCounter] = {}
        self._answers: list[Example] = []
        """The multiple-choice rows, reduced to what the priors need."""

    def append(self, row: SourceRow, example: Example, images: Sequence[str]) -> None:
        shown = {"images": list(images)} if len(images) > 1 else {"image": images[0] if images else None}
        content = {
            "id": example.id,
            **shown,
            "question": example.question,
            **_task_fields(row, example),
            "modality": example.modality,
            "kind": example.kind,
        }
        line = json.dumps(content, ensure_ascii=False) + "\n"
        with writing(self.path):
            self._file.write(line)
        self._digest.update(line.encode("utf-8"))
        self._images.update(images)
        self._by_modality[example.modality] += 1
        self._by_kind[example.kind] += 1
        self._by_task[row.task] += 1
        if row.task == "choice":
            self._choice_images.update(images)
            self._answers.append(dataclasses.replace(example, id="", image=None, more_images=(), question=""))
        else:
            self._tasks.setdefault(row.task, TaskCounter()).append(example, row.answer, images)

    def finish(self) -> SplitSummary:
        with writing(self.path):
            self._file.close()
        kept, option = kept_orders(example.options for example in self._answers)
        return SplitSummary(
            file=self.path.name,
            rows=self._by_task.total(),
            images=len(self._images),
            by_modality=dict(sorted(self._by_modality.items())),
            by_kind=dict(sorted(self._by_kind.items())),
            sha256=self._digest.hexdigest(),
            priors=Priors.of(self._answers) if self._answers else None,
            kept_order=kept,
            kept_order_by=option,
            by_task=dict(sorted(self._by_task.items())),
            choice_images=len(self._choice_images),
            tasks={task: rows.finish() for task, rows in sorted(self._tasks.items())},
        )


class PreparedDataWriter:
    """Checks rows and writes the usable ones."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.skipped: list[Skipped] = []
        self.images = ImageWriter(folder, source)
        self._folder, self._rows_folder = folder, Folder(folder)
        self._splits: dict[str, _Split] = {}
        with writing(folder):
            (folder / "images").mkdir()

    def add(self, row: SourceRow | Skipped) -> None:
        if isinstance(row, Skipped):
            self._skip(row)
            return
        try:
            split = self._split(row.split)
            example = self._checked(row, split) if row.task == "choice" else None
            check_image_count(len(row.images))
            images = self.images.add_all(row.images)
            if example is None:
                example = self._checked_with(row, split, images)
        except (BadRowError, BadImageError) as error:
            self._skip(Skipped(row.where, row.id, str(error)))
            return
        split.sources[example.id] = row.where
        split.append(row, example, images)

    def finish(self) -> dict[str, SplitSummary]:
        used = {name: split for name, split in self._splits.items() if split.sources}
        if not used and not self.skipped:
            raise ValueError("the source has no rows: give one with questions")
        if not used:
            bad = [row for row in self.skipped if not row.chosen] or self.skipped
            head = "; ".join(grouped([(f"{row.where} ({row.id})", row.reason) for row in bad])[:3])
            raise ValueError(f"no row can be used, of {sum(row.rows for row in self.skipped)}. {head}")
        for name in self._splits.keys() - used.keys():
            self._splits[name].path.unlink()
        return {name: split.finish() for name, split in used.items()}

    def _skip(self, row: Skipped) -> None:
        # ids, and file names in locations and reasons, come from the source: print and record them
        # as plain text
        where, reason = _plain(row.where, MAX_REASON), _plain(row.reason, MAX_REASON)
        self.skipped.append(dataclasses.replace(row, where=where, id=_plain(row.id, MAX_ID), reason=reason))

    def _split(self, name: str) -> _Split:
        if not _SPLIT.fullmatch(name):
            raise BadRowError(f"its split {shorten(name)} cannot be the name of a file: use letters, digits, - and _")
        if name not in self._splits:
            if len(self._splits) == MAX_SPLITS:
                raise ValueError(
                    f"there are more than {MAX_SPLITS} splits, {name!r} among them: name the column that says "
                    "train or test"
                )
            with writing(self._folder):
                self._splits[name] = _Split(self._folder / f"{name}.jsonl")
        return self._splits[name]

    def _checked_with(self, row: SourceRow, split: _Split, images: Sequence[str]) -> Example:
        """Return a row of another task than choice as it will be read back: boxes need the image.

        Raises:
            BadRowError: if it will not; images that it brought are gone then.
        """
        try:
            return self._checked(row, split, images)
        except BadRowError:
            self.images.take_back()
            raise

    def _checked(self, row: SourceRow, split: _Split, images: Sequence[str] = ()) -> Example:
        """Return the row as it will be read back, apart from images that are not given."""
        if not row.id.strip() or len(row.id) > MAX_ID or not row.id.isprintable():
            raise BadRowError(
                f"its id {shorten(row.id)} must be 1 to {MAX_ID} characters, none of them a control character"
            )
        content: dict[str, Any] = {
            "id": row.id,
            "question": row.question,
            **({"options": list(row.options)} if row.options or row.task == "choice" else {}),
            "answer": row.answer,
            "modality": row.modality,
            "kind": row.kind,
            **({} if row.task == "choice" else {"task": row.task}),
        }
        for key, value in content.items():
            if "\0" in (value if isinstance(value, str) else "".join(map(str, value))):
                raise BadRowError(f"its {key} holds a NUL byte: save the source as text again")
        if images:
            content["images"] = list(images)
        name, example = parse_row(content, "", self._rows_folder)
        if isinstance(example, str):
            raise BadRowError(example)
        if name in split.sources:
            raise BadRowError(f"its id was used by {split.sources[name]} already")
        return example


def _task_fields(row: SourceRow, example: Example) -> dict[str, Any]:
    """Return what a row's line says of its task: options, answer and, but of choice, its name."""
    if row.task == "choice":
        return {"options": list(example.options), "answer": written_answer(example.options, example.answer)}
    options = {"options": list(row.options)} if row.options else {}
    return {"task": row.task, **options, "answer": row.answer}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a RecordError that names the file and what to do."""
    try:
        yield
    except OSError as error:
        raise refusal(path, error, advice="run the command again") from error


def _plain(text: str, limit: int) -> str:
    """Escape control characters and lone surrogates, and cut the text at `limit` characters."""
    shown = text[: limit + 1]
    shown = shown if shown.isprintable() else repr(shown)[1:-1]
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def _file_name(sha256: str, path: PurePath) -> str:
    """Return an image's path in prepared data: named by content, with its own suffix if usual."""
    suffix = path.suffix.lower()
    return f"images/{sha256[:_HASH_LENGTH]}{suffix if re.fullmatch('[.][a-z0-9]{1,5}', suffix) else ''}"


def _short(path: Path, source: Path) -> str:
    """Return the path relative to the source, or its last component."""
    root = source.resolve() if source.is_dir() else source.resolve().parent
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
