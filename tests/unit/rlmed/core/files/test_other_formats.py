"""What is given for JSON Lines but is not is named, with the command that makes rows of it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from rlmed.commandline import expand
from rlmed.core.config.composing import compose_config
from rlmed.core.files.other_formats import to_prepare
from rlmed.data.examples import read_examples
from rlmed.data.loading import load_data
from rlmed.data.readers.registry import READERS

ROW = {"image": None, "question": "Which?", "options": ["liver", "spleen"], "answer": "liver"}
HEADER = b"image,question,A,B,answer\n1.png,Which?,liver,spleen,A\n"
DICOM = b"\0" * 128 + b"DICM" + b"\2\0\0\0"
NIFTI = b"\0" * 344 + b"n+1\0"

FILES = [
    ("questions.csv", HEADER, "table", "csv"),
    ("questions.TSV", HEADER.replace(b",", b"\t"), "table", "csv"),
    ("no ending", HEADER, "table", "csv"),
    ("renamed.jsonl", HEADER.replace(b",", b";"), "table", "csv"),
    ("excel.txt", b"\xef\xbb\xbf" + HEADER, "table", "csv"),
    ("other columns.csv", b"Bild,Frage,Antwort\n", "table", "csv"),
    ("empty.csv", b"", "table", "csv"),
    ("train-00000-of-00001.parquet", b"PAR1\0\0", "parquet", "huggingface"),
    ("shard", b"PAR1\0\0", "parquet", "huggingface"),
    ("1.dcm", b"", "DICOM", "dicom"),
    ("IM000001", DICOM, "DICOM", "dicom"),
    ("t1.nii", NIFTI, "NIfTI", "nifti"),
    ("t1.NII.gz", gzip.compress(NIFTI, mtime=0), "NIfTI", "nifti"),
    ("volume", NIFTI, "NIfTI", "nifti"),
]


@pytest.mark.parametrize(("name", "content", "what", "reader"), FILES)
def test_a_file_names_its_reader(tmp_path: Path, name: str, content: bytes, what: str, reader: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf" {re.escape(str(path))} .*\b{what}\b.* JSON Lines\b") as error:
        read_examples(path)
    assert f"python -m rlmed.prepare {reader} --source " in str(error.value)
    assert reader in READERS
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("q.xlsx", b"PK\3\4", r"spreadsheet\b.* CSV .*`python -m rlmed\.prepare csv --source \S*/q\.csv --out DIR`"),
        ("q.ods", b"PK\3\4", r"spreadsheet\b.* CSV .*`python -m rlmed\.prepare csv --source \S*/q\.csv --out DIR`"),
        ("q.zip", b"PK\3\4", r"archive\b.*`python -m rlmed\.prepare`"),
        ("q.tar.gz", b"\x1f\x8b", r"archive\b.*`python -m rlmed\.prepare`"),
        ("1.PNG", b"\x89PNG", r"picture\b.* questions\b"),
        ("q.json", json.dumps([ROW, ROW]).encode(), r"array\b.*`jq -c '\.\[\]' \S*/q\.json > \S*/q_lines\.jsonl`"),
        ("q.jsonl", json.dumps([ROW, ROW], indent=1).encode(), r"array\b.* \S*/q\.jsonl > \S*/q_lines\.jsonl`"),
        ("long.json", json.dumps([ROW] * 100).encode(), r"array\b.* \S*/long\.json > \S*/long_lines\.jsonl`"),
    ],
)
def test_what_no_reader_takes_as_it_is_says_what_to_do_first(
    tmp_path: Path, name: str, content: bytes, advice: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.match(rf"{re.escape(str(tmp_path / name))} .*\b{advice}", to_prepare(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows", "rows.csv"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
def test_rows_are_rows_whatever_the_file_is_called(tmp_path: Path, name: str, start: str) -> None:
    (tmp_path / name).write_text(start + json.dumps(ROW) + "\n", encoding="utf-8")
    assert to_prepare(tmp_path / name) == ""
    assert len(read_examples(tmp_path / name).examples) == 1


@pytest.mark.parametrize("content", [b"", b"[1]\n", b"[]\n", b"\xff\xfe\0", b"hello world\n", b"one,two\n"])
def test_what_is_not_known_is_left_to_who_reads_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert to_prepare(tmp_path / "rows.jsonl") == ""


@pytest.mark.parametrize(
    ("files", "reader"),
    [
        ({"a/1.dcm": DICOM, "questions.csv": HEADER}, "dicom"),
        ({"a/b/IM1": DICOM}, "dicom"),
        ({"t1.nii.gz": b"\x1f\x8b", "questions.csv": HEADER}, "nifti"),
        ({"1.dcm": DICOM, "2.png": b"\x89PNG", "questions.csv": HEADER}, "files"),
        ({"data/test-0.parquet": b"PAR1", "README.md": b"#"}, "huggingface"),
        ({"mri.csv": HEADER, "images/1.png": b"\x89PNG", "._mri.csv": b"\0"}, "csv"),
    ],
)
def test_a_folder_names_its_reader(tmp_path: Path, files: dict[str, bytes], reader: str) -> None:
    root = tmp_path / "my data"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    assert f"`python -m rlmed.prepare {reader} --source '{root}' --out DIR`" in to_prepare(root)


def test_a_folder_of_rows_names_a_file_that_is_there_and_an_empty_one_what_makes_such(tmp_path: Path) -> None:
    assert "python -m rlmed.prepare" in to_prepare(tmp_path)
    (tmp_path / "mri.jsonl").write_text(json.dumps(ROW))
    assert to_prepare(tmp_path).endswith(f"for example {tmp_path / 'mri.jsonl'}")


def test_every_door_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("q.csv").write_bytes(HEADER)
    Path("series").mkdir()
    Path("series", "1.dcm").write_bytes(DICOM)
    Path("t.jsonl").write_text(json.dumps(ROW))
    for argument, command in (
        ("data=q.csv", "prepare csv --source q.csv"),
        ("data=./q.csv", "prepare csv --source q.csv"),
        ("data=series", "prepare dicom --source series"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{argument}: ")) as error:
            expand([argument], cuda=False)
        assert command in str(error.value)
    for key in ("data.train=q.csv", "data.eval=[q.csv]"):
        config = compose_config("train", ["data=jsonl", "data.train=t.jsonl", "data.eval=[t.jsonl]", key])
        with pytest.raises(ValueError, match=r"prepare csv --source q\.csv"):
            load_data(config.data, _NoRenderer(), training=True)  # type: ignore[arg-type]


def test_a_list_of_training_files_is_said_to_be_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose_config("train", ["data=jsonl", "data.train='[a.jsonl,b.jsonl]'"])
    with pytest.raises(ValueError, match=r"data\.train=\[a\.jsonl,b\.jsonl\]: .*\bcat\b"):
        load_data(config.data, _NoRenderer(), training=True)  # type: ignore[arg-type]


class _NoRenderer:
    def render(self, example: object) -> None:
        """Takes every row."""


def test_generated_rows_are_not_mixed_with_ones_own_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlmed.data.loading.write_dataset", lambda folder, seed: None)
    (tmp_path / "outputs" / "phantom-0").mkdir(parents=True)
    for name in ("t", *(f"outputs/phantom-0/{file}" for file in ("train_mri", "test_mri", "test_ct", "test_xray"))):
        Path(f"{name}.jsonl").write_text(json.dumps(ROW))
    for arguments, said in (
        (["data.train=t.jsonl"], r"data\.train .*\bevaluated\b.* data=jsonl\b"),
        (["data.eval=[t.jsonl]"], r"data\.eval .*\btraining\b.* data=jsonl\b"),
        ([], None),
        (["data=jsonl", "data.train=t.jsonl", "data.eval=[t.jsonl]"], None),
    ):
        caplog.clear()
        config = compose_config("train", ["data=phantom", *arguments])
        load_data(config.data, _NoRenderer(), training=True)  # type: ignore[arg-type]
        assert ("data=jsonl" in caplog.text) == (said is not None)
        assert said is None or re.search(said, caplog.text)
    with caplog.at_level("INFO"):
        load_data(compose_config("train", ["data=phantom"]).data, _NoRenderer(), training=True)  # type: ignore[arg-type]
    assert "(data.phantom_seed=0) are in outputs/phantom-0" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        (["data=phantom_tasks"], "phantom-0-mixed"),
        (["data=phantom_tasks", "data.task=open", "data.phantom_seed=3"], "phantom-3-open"),
        (["+profile=tiny", "data=phantom_tasks", "data.task=grounding"], "phantom-0-grounding"),
    ],
)
def test_a_task_of_generated_data_has_files_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def write(where: Path, seed: int, names: list[str]) -> None:
        asked.append((where, seed, names))
        where.mkdir(parents=True)
        for part in ("train", "test"):
            (where / f"{part}_{names[0]}.jsonl").write_text(json.dumps(ROW))

    monkeypatch.setattr("rlmed.data.loading.write_task_dataset", write)
    config = compose_config("train", overrides)
    data = load_data(config.data, _NoRenderer(), training=True)  # type: ignore[arg-type]
    _, seed, task = folder.split("-")
    assert asked == [(Path("outputs") / folder, int(seed), [task])]
    assert [file.path for file in data.files] == [
        Path("outputs", folder, f"{part}_{task}.jsonl") for part in ("train", "test")
    ]
