"""`python -m rlmed.leakage` on small files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlmed import leakage
from rlmed.data.leakage.findings import LeakageReport
from tests.unit.rlmed.data.pictures import picture, save


def write(folder: Path, name: str, images: list[str]) -> str:
    path = folder / f"{name}.jsonl"
    rows = [
        {"id": f"{name}-{i}", "image": image, "question": "Which?", "options": ["a", "b"], "answer": "a"}
        for i, image in enumerate(images)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for seed in range(6):
        save(tmp_path, f"{'abcdef'[seed]}.png", picture(seed))
    save(tmp_path, "copy.jpg", picture(1), quality=60)
    return [
        write(tmp_path, "train", ["a.png", "b.png", "c.png"]),
        write(tmp_path, "ct", ["d.png", "copy.jpg"]),
        write(tmp_path, "mri", ["e.png", "missing.png"]),
    ]


def test_table_pairs_and_json(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leakage.main(["--train", files[0], "--test", *files[1:], "--json", str(tmp_path / "out.json")])
    shown = capsys.readouterr()
    assert "ct-1 (copy.jpg) and training row train-1 (b.png): near" in shown.out
    assert "missing.png does not exist" in shown.err
    report = LeakageReport.from_json(json.loads((tmp_path / "out.json").read_text()))
    assert [(file.name, file.rows, file.leaking_rows) for file in report.files] == [("ct", 2, 1), ("mri", 1, 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: [files[0], "no.jsonl"], "data file no.jsonl cannot be read"),
        (lambda files: [files[0], files[1], files[1]], "files of the same name"),
    ],
)
def test_bad_arguments(files: list[str], change, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    train, *tests = change(files)
    with pytest.raises(SystemExit) as caught:
        leakage.main(["--train", train, "--test", *tests])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
