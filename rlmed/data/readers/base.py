"""What a reader is: a function from a source as it is published to rows of one layout, with a description of both.

A reader yields; it keeps no list of rows, so a source of any length needs little memory. It decides nothing about files that
are written: `rlmed.data.layout` checks every row and turns what cannot be used into a counted skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that the reader makes itself, for example of one slice of a volume.

    Example:
        Picture(key="000017", load=lambda: Image.fromarray(slice_as_uint8))
    """

    key: str
    """File name without its ending: letters, digits, - and _ only, nothing of a patient. One key is one image, written once."""
    load: Callable[[], Image.Image]
    """The picture in mode L or RGB; called when it is written. Raises BadImageError."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image file that lies in an archive or a table: copied as it is, like a file.

    Example:
        Encoded(name="figures/PMC1_F2.jpg", load=lambda: archive.read("figures/PMC1_F2.jpg"), key="figures/PMC1_F2.jpg")
    """

    name: str
    """For messages; what its ending says is the ending of the copy."""
    load: Callable[[], bytes]
    """The file's bytes; called when it is written. Raises BadImageError."""
    key: str = ""
    """One key is one image, loaded once; "" where rows have no name in common for it."""


SourceImage = Path | Picture | Encoded
"""A file to copy as it is, a picture that the reader makes, or a file inside of another."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One question as its source has it; nothing in it is checked yet.

    Example:
        SourceRow(where="row 17 of questions.csv", split="test_ct", id="17", question="Which organ is shown?",
                  options=("liver", "spleen"), answer="liver", image=Path("/data/ct/17.png"), modality="CT", kind="anatomy")
    """

    where: str
    """Its place in the source, for messages and the manifest: no patient's name, no path of this machine."""
    split: str
    """The JSON Lines file it goes into, without the ending."""
    id: str
    """Distinct within its split."""
    question: str
    options: tuple[str, ...]
    answer: str
    """As `rlmed.data.choices.written_answer` writes it, or as the source does where options are a list without letters."""
    image: SourceImage | None
    """None for a question without an image."""
    modality: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row of the source that is left out.

    Example:
        Skipped(where="row 18 of questions.csv", id="18", reason="it has no answer")
    """

    where: str
    id: str
    reason: str
    """What is wrong and, where that helps, the cure; no patient's name."""
    chosen: bool = False
    """True when the row is sound and left out by choice, for example another language: --on-bad-row error lets it pass."""
    rows: int = 1
    """More where many rows are left out by choice for one reason, and not listed one by one."""


@dataclass(frozen=True)
class Option:
    """One option of a reader on the command line: what `argparse.ArgumentParser.add_argument` is given.

    Without it on the command line, the reader's own default holds.

    Example:
        Option("--window", {"nargs": 2, "type": float, "metavar": ("CENTER", "WIDTH"), "help": "grey values shown"})
    """

    flag: str
    settings: Mapping[str, Any]
    needs: str = ""
    """The option without which it does nothing, for example "--train"."""
    beside: str = ""
    """The option beside which it does nothing, perhaps with its value, for example "--open skip"."""

    @property
    def keyword(self) -> str:
        """The keyword argument of the reader: `--allow-burned-in` is `allow_burned_in`."""
        return _keyword(self.flag)

    def check(self, given: Mapping[str, Any]) -> None:
        """Make sure that it does something.

        Args:
            given: the reader's options on the command line, by keyword.

        Raises:
            ValueError: when it is given and does nothing.
        """
        if self.keyword not in given:
            return
        if self.needs and _keyword(self.needs) not in given:
            raise ValueError(f"{self.flag} does nothing without {self.needs}: give both, or leave it out")
        flag, _, value = self.beside.partition(" ")
        if self.beside and str(given.get(_keyword(flag), "")) == (value or "True"):
            raise ValueError(f"{self.flag} does nothing beside {self.beside}: leave one of them out")


def _keyword(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Reader:
    """A reader and what is said about it on the command line, in the manifest and in docs/data.md.

    Example:
        READER = Reader(name="csv", title="A table of questions", read=read, options=(Option("--delimiter", {...}),))
    """

    name: str
    """On the command line: lower case, with underscores."""
    title: str
    """What it reads, in a line."""
    read: Callable[..., Iterator[SourceRow | Skipped]]
    """`read(source, **options)`: rows in a fixed order. Raises ValueError for a source that cannot be read at all."""
    options: tuple[Option, ...] = ()
    licence: str = ""
    """Of the data, as its authors state it; empty for a user's own."""
    citation: str = ""
    url: str = ""
    """Where the data is published."""
    private: bool = False
    """True when even the names of source files may be those of patients: the manifest then has no source or paths."""
