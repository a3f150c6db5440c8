"""Tables of reports: columns found or named, several images and references, bad rows skipped."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from rlmed.data.readers.base import Encoded, Skipped, SourceRow
from rlmed.data.readers.formats.reports import QUESTION, QUESTION_OF_SEVERAL, read
from tests.unit.rlmed.data.pictures import marked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        marked(number).save(tmp_path / f"{number}.png")
    return tmp_path


def table(folder: Path, *lines: str, name: str = "reports.csv") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def usable(rows) -> list[SourceRow]:
    return [row for row in rows if isinstance(row, SourceRow)]


def test_a_full_row_field_by_field(folder: Path) -> None:
    path = table(
        folder,
        "id,image,Indication,Findings,modality,split",
        '7,1.png,"Cough, fever",No effusion.,X-ray,test',
    )
    assert list(read(path)) == [
        SourceRow(
            where="line 2 of reports.csv",
            split="test",
            id="7",
            question=f"{QUESTION}\nIndication: Cough, fever",
            options=(),
            answer="No effusion.",
            image=folder / "1.png",
            modality="X-ray",
            task="report",
        )
    ]


def test_several_images_and_questions_of_ones_own(folder: Path) -> None:
    path = table(
        folder,
        "images\treport\tfindings\tquestion\thistory",
        "1.png|2.png\tBoth clear.\tother\t\t",
        "1.png\tClear.\tother\tImpression?\tPain",
        name="views.tsv",
    )
    first, second = usable(read(path))
    assert first.images == (folder / "1.png", folder / "2.png")
    assert (first.question, first.answer, first.split) == (QUESTION_OF_SEVERAL, "Both clear.", "views")
    assert (second.question, second.answer) == ("Impression?\nIndication: Pain", "Clear.")
    assert [row.question for row in usable(read(path, question="Report."))] == ["Report.", second.question]
    (named, _) = usable(read(path, column=["report=findings"], without_images=True, split="all"))
    assert (named.answer, named.images, named.split) == ("other", (), "all")


def test_bad_rows_are_skipped(folder: Path) -> None:
    path = table(folder, "image,report", "1.png,", "9.png,Clear.", ",Clear.", "1.png,Clear.", ",")
    rows = list(read(path))
    reasons = [row.reason for row in rows if isinstance(row, Skipped)]
    assert reasons[0] == "it has no report"
    assert "'9.png' does not exist" in reasons[1]
    assert "it has no image" in reasons[2]
    assert [row.id for row in usable(rows)] == ["reports-5"]


def test_parquet_with_images_inside_and_lists_of_references(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    marked(3).save(stream, format="PNG")
    (folder / "data").mkdir()
    rows = [
        {"image": {"bytes": stream.getvalue(), "path": "x.png"}, "report": ["Clear.", "No finding."]},
        {"image": {"bytes": stream.getvalue(), "path": "x.png"}, "report": ["Mass."]},
        {"image": {"bytes": stream.getvalue(), "path": "x.png"}, "report": []},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
    first, second, bad = read(folder / "data")
    assert isinstance(first, SourceRow)
    assert isinstance(second, SourceRow)
    assert isinstance(first.image, Encoded)
    assert first.image.load() == stream.getvalue()
    assert (first.answer, first.split, first.task) == (["Clear.", "No finding."], "train", "report")
    assert second.answer == "Mass."
    assert isinstance(bad, Skipped)
    assert bad.reason == "it has no report"


@pytest.mark.parametrize(
    ("header", "column", "message"),
    [
        ("image,text", [], "no column for report: name it with --column report=NAME"),
        ("image,report", ["report=Befund"], "report=Befund"),
        ("picture,report", [], "no column for image"),
        ("image,report", ["answer=report"], "did you mean --column report=answer"),
    ],
)
def test_a_column_that_is_missing_is_named(folder: Path, header: str, column: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read(table(folder, header, "1.png,x"), column=column))
