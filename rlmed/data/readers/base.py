"""Reader interface: a function from a published source to rows of one format, and its description.

A reader yields rows and keeps none, so a source of any length needs little memory. It makes no
decisions about output files: `rlmed.data.prepare.prepared_data` checks every row and turns unusable
ones into counted skips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

INSTALL = "pip install -c requirements.lock -e '.[readers]' in rlmed's checkout"
"""How to install the libraries of the readers that need any."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that the reader makes itself, for example from one slice of a volume.

    Example:
        >>> Picture(key="000017", load=lambda: Image.new("L", (512, 512))).load().size
        (512, 512)
    """

    key: str
    """File name without suffix: letters, digits, - and _ only, no patient data.

    One key is one image, written once.
    """
    load: Callable[[], Image.Image]
    """Returns the picture in mode L or RGB; called when it is written. Raises BadImageError."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image file inside an archive or a table; copied unchanged, like a file.

    Example:
        >>> archive = {"figures/PMC1_F2.jpg": b"..."}
        >>> [Encoded(name=name, load=lambda: archive[name], key=name).name for name in archive]
        ['figures/PMC1_F2.jpg']
    """

    name: str
    """For messages; the copy keeps its suffix."""
    load: Callable[[], bytes]
    """Returns the file's bytes; called when it is written. Raises BadImageError."""
    key: str = ""
    """One key is one image, loaded once; "" if rows share no name for it."""


SourceImage = Path | Picture | Encoded
"""A file to copy unchanged, a picture that the reader makes, or a file inside another."""


Answer = str | list[str] | list[list[float]]
"""A text, several, or boxes [x0, y0, x1, y1] in pixels of the first image file."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One question as in its source, still unchecked.

    Example:
        >>> SourceRow(where="row 17 of questions.csv", split="test_ct", id="17", question="Which organ is shown?",
        ...           options=("liver", "spleen"), answer="liver", image=Path("/data/ct/17.png")).modality
        ''
    """

    where: str
    """Location in the source, for messages and manifest, without patient name or local path."""
    split: str
    """Name of the JSON Lines file that it goes into, without suffix."""
    id: str
    """Unique within its split."""
    question: str
    options: tuple[str, ...]
    answer: Answer
    """As `written_answer` writes it, or as in the source if options are a list without letters; of
    other tasks, what the row's `answer` will be."""
    image: SourceImage | None
    """The first one; None for a question without an image."""
    modality: str = ""
    kind: str = ""
    more_images: tuple[SourceImage, ...] = ()
    """The images after the first, in the order in which the model sees them."""
    task: str = "choice"
    """`choice`, `open`, `grounding`, `labels` or `report`."""

    @property
    def images(self) -> tuple[SourceImage, ...]:
        """All images in order: none, one or several."""
        return () if self.image is None else (self.image, *self.more_images)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A skipped row of the source.

    Example:
        >>> Skipped(where="row 18 of questions.csv", id="18", reason="it has no answer").rows
        1
    """

    where: str
    id: str
    reason: str
    """What is wrong and, where it helps, what to do; no patient name."""
    chosen: bool = False
    """True if a sound row is skipped by choice, as by language: --on-bad-row error accepts it."""
    rows: int = 1
    """Above 1 if many rows are skipped by choice for one reason and not listed one by one."""


@dataclass(frozen=True)
class Option:
    """One command-line option of a reader: the arguments of `argparse.ArgumentParser.add_argument`.

    If it is not given, the reader's own default applies.

    Example:
        >>> Option("--allow-burned-in", {"action": "store_true", "help": "read marked files too"}).keyword
        'allow_burned_in'
    """

    flag: str
    settings: Mapping[str, Any]
    needs: str = ""
    """The option that it requires to have an effect, for example "--train"."""
    beside: str = ""
    """The option that makes it a no-op, perhaps with its values, for example "--open skip|keep"."""

    @property
    def keyword(self) -> str:
        """Return the reader's keyword argument: `--allow-burned-in` is `allow_burned_in`."""
        return _keyword(self.flag)

    def check(self, given: Mapping[str, Any]) -> None:
        """Check that the option has an effect.

        Args:
            given: the reader's options on the command line, by keyword.

        Raises:
            ValueError: if it is given and has no effect.
        """
        if self.keyword not in given:
            return
        if self.needs and _keyword(self.needs) not in given:
            raise ValueError(f"{self.flag} does nothing without {self.needs}: give both, or leave it out")
        flag, _, values = self.beside.partition(" ")
        value = str(given.get(_keyword(flag), ""))
        if self.beside and value in (values or "True").split("|"):
            shown = f"{flag} {value}" if values else flag
            raise ValueError(f"{self.flag} does nothing beside {shown}: leave one of them out")


UNSEEN = (
    "Known from publications alone, never tried: {files}. If their layout differs, rows are skipped with reasons or a name "
    "is reported missing: read the files with csv, huggingface or as JSON Lines instead, or correct the reader."
)
"""What help says of a reader's `unseen` files."""


def _keyword(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Reader:
    """A reader and its description for the command line, the manifest and docs/data.md.

    Example:
        >>> def read(source: Path) -> Iterator[SourceRow | Skipped]:
        ...     yield Skipped(where=f"row 1 of {source.name}", id="1", reason="it has no answer")
        >>> reader = Reader(name="mine", title="A table of questions", read=read)
        >>> [row.where for row in reader.read(Path("a.csv"))]
        ['row 1 of a.csv']
    """

    name: str
    """Name on the command line: lower case, with underscores."""
    title: str
    """What it reads, in one line."""
    read: Callable[..., Iterator[SourceRow | Skipped]]
    """`read(source, **options)` yields rows in a fixed order.

    Raises ValueError for an unreadable source.
    """
    options: tuple[Option, ...] = ()
    licence: str = ""
    """Licence of the data as stated by its authors; empty for a user's own."""
    citation: str = ""
    url: str = ""
    """Where the data is published."""
    unseen: str = ""
    """Files whose layout is known from publications alone, for example "the published files".

    Empty if the reader was tried on such files.
    """
    private: bool = False
    """True if even file names may name patients: the manifest then omits source and paths."""

    @property
    def summary(self) -> str:
        """Return the title, marked if files of this kind were never seen."""
        return f"{self.title} [never tried: {self.unseen}]" if self.unseen else self.title

    @property
    def description(self) -> str:
        """Return title, address and, of files never seen, what to do if their layout differs."""
        doubt = UNSEEN.format(files=self.unseen) if self.unseen else ""
        return " ".join(part for part in (f"{self.title}.", doubt, self.url) if part)
