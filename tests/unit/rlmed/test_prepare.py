"""The command: what it prints, its exit status, and that a run can read what it writes."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from rlmed import prepare
from rlmed.core.config.composing import compose_config
from rlmed.data.loading import load_data
from rlmed.data.readers.registry import READERS, find_reader
from rlmed.prepare import main
from tests.configs import renderer_of
from tests.root import ROOT
from tests.unit.rlmed.data.pictures import marked

TABLE = "image,question,A,B,answer,modality,split\n"
BAD = [("Which?", "spleen", "lung"), ("Which?", "spleen", "heart"), ("", "spleen", "A"), ("Which?", "spleen", "")]
"""Question, second option and answer of rows that cannot be used, two for the same reason."""


def keywords(function: Callable[..., object]) -> set[str]:
    """The names of its keyword arguments, those of `**options: Unpack[Options]` too."""
    names = set(function.__kwdefaults__ or {})
    code = function.__code__
    if code.co_flags & inspect.CO_VARKEYWORDS:
        hint = get_type_hints(function)[code.co_varnames[code.co_argcount + code.co_kwonlyargcount]]
        names |= set(get_type_hints(get_args(hint)[0]))
    return names


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(4):
        marked(number).save(folder / f"{number}.png")
    lines = [
        f"{number % 4}.png,Which?,liver,spleen,{'AB'[number % 2]},CT,{'test' if number > 5 else 'train'}\n"
        for number in range(8)
    ]
    (folder / "questions.csv").write_text(TABLE + "".join(lines) + "9.png,Which?,liver,spleen,A,CT,train\n")
    return folder


def command(source: Path, out: Path, *more: str) -> list[str]:
    return ["csv", "--source", str(source), "--out", str(out), *more]


def test_it_says_what_it_wrote_and_what_it_left_out(source, tmp_path, capsys):
    main(command(source / "questions.csv", tmp_path / "out"))
    shown = capsys.readouterr().out
    cells = {line.split()[0]: line.split()[1:4] for line in shown.splitlines() if line.strip()}
    assert (cells["train"], cells["test"]) == (["6", "4", "50.0"], ["2", "2", "50.0"])
    assert "skipped:    1 bad row\n- line 10 of questions.csv (questions-10): " in shown
    assert f"written:    {tmp_path / 'out' / 'manifest.json'}" in shown
    for split in ("train", "test"):
        assert f"rows:       {tmp_path / 'out' / split}.jsonl\n" in shown


def test_it_says_how_many_rows_keep_the_order_of_their_options(source, tmp_path, capsys):
    lines = [
        f"0.png,Which {n}?,liver,{other},A,CT,train\n" for n, other in enumerate(["spleen", "both", "none of these"])
    ]
    (source / "questions.csv").write_text(TABLE + "".join(lines))
    main(command(source, tmp_path / "out"))
    assert re.search(r"train: 2 of 3 rows .* order .*'both'\n", capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]["kept_order"] == 2


def test_of_other_tasks_it_counts_answers_and_shows_no_empty_columns(source, tmp_path, capsys):
    def shown(*arguments: str) -> tuple[str, list[list[str]]]:
        main([*arguments, "--out", str(tmp_path / f"out{len(list(tmp_path.iterdir()))}")])
        said = capsys.readouterr().out
        return said, [line.split() for line in said.splitlines() if line.split()[:1] == ["mine"]]

    (source / "mine.csv").write_text("image,report\n0.png,Clear.\n1.png,clear\n1.png,Mass.\n")
    said, (cells,) = shown("reports", "--source", str(source / "mine.csv"))
    assert cells == ["mine", "report", "3", "2", "3", "reports", "66.7"]
    assert "chance" not in said

    def box(image: int, category: int, *bbox: int) -> dict:
        return {"image_id": image, "category_id": category, "bbox": bbox}

    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(3)],
        "categories": [{"id": 0, "name": "cyst"}, {"id": 1, "name": "mass"}],
        "annotations": [box(0, 0, 0, 0, 9, 9), box(0, 0, 9, 9, 9, 9), box(0, 1, 0, 0, 9, 9), box(1, 0, 5, 0, 9, 9)],
    }
    (source / "mine.json").write_text(json.dumps(content))
    said, (cells,) = shown("coco", "--source", str(source / "mine.json"), "--images", str(source), "--absent", "2")
    assert cells == ["mine", "grounding", "6", "3", "4", "boxes", "3", "50.0"]
    assert "chance" not in said
    said, _ = shown(*command(source / "questions.csv", tmp_path)[:3])
    assert "one answer" not in said


def test_of_a_mixture_each_table_has_its_own_rows(source, tmp_path, capsys):
    rows = [
        {"image_name": "0.png", "question": f"Is it {n}?", "answer": "yes", "phrase_type": "para"} for n in range(2)
    ]
    rows += [{"image_name": "1.png", "question": f"What is {n}?", "answer": "A liver", "qid": n} for n in range(3)]
    (source / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    main(["vqa_rad", "--source", str(source), "--out", str(tmp_path / "out"), "--open", "keep"])
    cells = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["train"]]
    assert cells[0][:4] == ["train", "2", "1", "50.0"]
    assert cells[1] == ["train", "open", "3", "1", "3", "texts", "100.0"]


@pytest.mark.parametrize("data", ["jsonl", "phantom"])
def test_what_it_writes_is_what_a_run_reads(source, tmp_path, tiny_folder, data, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    main(command(source, tmp_path / "out"))
    config = compose_config(
        "train",
        [
            f"data={data}",
            f"data.train={tmp_path / 'out' / 'train.jsonl'}",
            f"data.eval=[{tmp_path / 'out' / 'test.jsonl'}]",
            f"model.path={tiny_folder('qwen2_vl')}",
            "data.on_bad_row=error",
            "data.max_prompt_tokens=1024",
        ],
    )
    read = load_data(config.data, renderer_of(config), training=True)
    assert ("data.max_prompt_tokens=1024: set data=jsonl" in caplog.text) == (data == "phantom")
    assert [row.letter for row in read.train_examples] == list("ABABAB")
    assert [row.modality for row in read.evals[0].examples] == ["CT", "CT"]
    assert not (tmp_path / "outputs").exists()  # nothing is generated where both files are given


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--on-bad-row", "error"), "error: line 10 of questions.csv (questions-10): its image '9.png' does not exist"),
        (("--column", "question=Frage"), "error: questions.csv has no column for --column question=Frage"),
        (("--images", "nowhere"), "error: images nowhere are neither a folder nor a .zip"),
    ],
)
def test_an_error_is_one_line_and_status_2_and_leaves_nothing(source, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        main(command(source, tmp_path / "out", *more))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_earlier_folder_is_replaced_on_demand(source, tmp_path, capsys):
    out = tmp_path / "out"
    main(command(source, out))
    with pytest.raises(SystemExit):
        main(command(source, out))
    assert "--overwrite" in capsys.readouterr().err
    main(command(source, out, "--overwrite", "--split", "mine", "--without-images"))
    assert json.loads((out / "manifest.json").read_text())["options"] == {"split": "mine", "without_images": True}
    assert list((out / "images").iterdir()) == []


def test_an_interrupted_command_says_that_nothing_was_written(source, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_prepared_data", interrupted)
    with pytest.raises(SystemExit, match="nothing was written"):
        main(command(source, tmp_path / "out"))


def test_many_skips_are_counted_and_not_all_shown(source, tmp_path, capsys):
    rows = "".join(f"{number}.png,Which?,liver,spleen,A,CT,train\n" for number in range(20))
    rows += "".join(f"0.png,{question},liver,{other},{answer},CT,train\n" for question, other, answer in BAD)
    (source / "questions.csv").write_text(TABLE + rows)
    main(command(source, tmp_path / "out"))
    shown = capsys.readouterr().out
    assert "skipped:    20 bad rows, 3 of 4 reasons shown, all in manifest.json\n- 16 rows, such as line 6 " in shown
    assert [line.split(" of ")[0] for line in shown.splitlines() if line.startswith("- ")] == [
        "- 16 rows, such as line 6",
        "- 2 rows, such as line 22",
        "- line 24",
    ]
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"]["rows"]) == 20


@pytest.mark.parametrize("name", sorted(READERS))
def test_every_reader_has_help_and_takes_its_own_options(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(option.flag in shown for option in READERS[name].options)
    assert {option.keyword for option in READERS[name].options} <= keywords(READERS[name].read)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["csv", "--images", "x", "--without-images"],
            "--images does nothing beside --without-images: leave",
        ),
        (["pmc_vqa", "--without-images", "--images", "x"], "--images does nothing beside --without-images"),
        (["medvlm_r1", "--train-rows", "500"], "--train-rows does nothing without --train: give both"),
        (["omnimedvqa", "--seed", "3"], "--seed does nothing without --test-share: give both"),
        (["vqa_rad", "--open", "skip", "--seed", "3"], "--seed does nothing beside --open skip: "),
        (["slake", "--distractors", "2", "--open", "skip"], "--distractors does nothing beside --open skip"),
        (["slake", "--distractors", "2", "--open", "keep"], "--distractors does nothing beside --open keep"),
        (["slake", "--boxes", "--without-images"], "--boxes does nothing beside --without-images: leave"),
        (["coco", "--seed", "2"], "--seed does nothing without --absent: give both"),
        (["huggingface", "--revision", "main"], "--revision main is for data "),
    ],
)
def test_an_option_that_does_nothing_is_refused(source, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        main([*given, "--source", str(source), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(READERS))
def test_options_that_are_needed_or_shut_out_exist(name):
    flags = {option.flag for option in READERS[name].options}
    named = {entry.partition(" ")[0] for option in READERS[name].options for entry in (option.needs, option.beside)}
    assert named - {""} <= flags


def test_a_reader_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        main(["mimic", "--source", "a", "--out", "b"])
    assert "invalid choice: 'mimic'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'mimic'; expected one of csv"):
        find_reader("mimic")


def test_a_killed_command_leaves_no_folder_that_looks_whole(source, tmp_path):
    code = (
        "import os, sys\n"
        "from rlmed.data.prepare import prepared_data\n"
        "prepared_data.rename_into_place = lambda *_, **__: os.kill(os.getpid(), 9)\n"
        "from rlmed.prepare import main\n"
        "main(sys.argv[1:])\n"
    )
    arguments = [sys.executable, "-c", code, *command(source, tmp_path / "out")]
    assert subprocess.run(arguments, check=False, cwd=ROOT).returncode == -9
    assert not (tmp_path / "out").exists()
    main(command(source, tmp_path / "out"))
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("0.png,Which?", '0.png,"Which?', "read:       9 rows: 7 written, 2 skipped"),
        ("3.png,", ",,,,,,\n\n3.png,", "10 rows: 8 written, 1 skipped, 1 left out"),
        ("0.png", "._0.png", "read:       9 rows: 7 written, 2 skipped"),
    ],
)
def test_the_numbers_of_the_summary_add_up(source, tmp_path, capsys, old, new, line):
    text = (source / "questions.csv").read_text()
    (source / "questions.csv").write_text(text.replace(old, new, 1))
    main(command(source, tmp_path / "out"))
    shown = capsys.readouterr().out
    assert line in shown
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    counted = manifest["rows"]
    assert counted["read"] == counted["written"] + counted["bad"] + counted["by_choice"]
    assert counted["written"] == sum(split["rows"] for split in manifest["splits"].values())
    assert len(manifest["skipped"]["rows"]) == counted["bad"] + counted["by_choice"]


def test_a_table_without_rows_is_told(source, tmp_path, capsys):
    (source / "questions.csv").write_text(TABLE)
    with pytest.raises(SystemExit):
        main(command(source, tmp_path / "out"))
    assert capsys.readouterr().err == "error: the source has no rows: give one with questions\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["csv", "--source", "Source/questions.csv"], "'source/questions.csv', which differs in case"),
        (["csv", "--source", "source\\questions.csv"], "'source/questions.csv', which differs in backslashes"),
        (["csv", "--source", "source/questions"], "'source/questions.csv', which differs in its ending"),
        (["csv", "--source", "source", "--images", "Source"], "'source', which differs in case"),
        (["huggingface", "--source", "Source"], "'source', which differs in case"),
        (["omnimedvqa", "--source", "Source"], "'source', which differs in case"),
        (["slake", "--source", "Source"], "'source', which differs in case"),
        (["dicom", "--source", "Source"], "'source', which differs in case"),
        (["vqa_rad", "--source", "Source"], "'source', which differs in case"),
        (["medvlm_r1", "--source", "source/questions.CSV"], "'source/questions.csv', which differs in case"),
    ],
)
def test_a_source_whose_name_differs_is_told(source, tmp_path, monkeypatch, capsys, given, message):
    if given[0] == "dicom":
        pytest.importorskip("pydicom")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*given, "--out", "out"])
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_help_and_documents_say_which_files_were_never_seen(capsys):
    unseen = {reader.name for reader in READERS.values() if reader.unseen}
    assert unseen == {"omnimedvqa", "vqa_rad", "slake", "path_vqa", "pmc_vqa", "medvlm_r1"}
    table = [line for line in (ROOT / "docs/data.md").read_text().splitlines() if line.startswith("| [`")]
    assert {line.split("`")[1] for line in table} == READERS.keys()
    assert {line.split("`")[1] for line in table if "never seen**" in line} == unseen
    for arguments in (["--help"], *([name, "--help"] for name in READERS)):
        with pytest.raises(SystemExit):
            prepare.parse_arguments(arguments)
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("never tried:") == (len(unseen) if len(arguments) == 1 else arguments[0] in unseen)
        assert ("read the files with csv" in said) == (arguments[0] in unseen)
