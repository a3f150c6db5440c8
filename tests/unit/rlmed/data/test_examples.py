"""JSON Lines: good rows become examples, bad ones counted skips, broken files errors with line."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlmed.data import examples as jsonl
from rlmed.data.examples import SkippedRow, format_skips, read_examples
from rlmed.data.images import MAX_IMAGES
from tests.unit.rlmed.data.pictures import marked

OPTIONS = ["head", "chest", "abdomen", "knee"]


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    marked().save(root / "images" / "1.png")
    marked().save(tmp_path / "outside.png")
    return root


def row(**changes) -> dict:
    content = {"image": "images/1.png", "question": "Which part?", "options": OPTIONS, "answer": "knee", **changes}
    return {key: value for key, value in content.items() if value is not ...}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    return path


def test_a_full_row_field_by_field(folder):
    path = write(folder, row(id="q7", modality="MRI", kind="anatomy", completion="<think>x</think><answer>D</answer>"))
    result = read_examples(path)
    (example,) = result.examples
    assert (example.id, example.question, example.options, example.answer) == ("q7", "Which part?", tuple(OPTIONS), 3)
    assert example.image == folder / "images" / "1.png"
    assert (example.modality, example.kind, example.letter) == ("MRI", "anatomy", "D")
    assert example.completion == "<think>x</think><answer>D</answer>"
    assert result.skipped == ()
    assert result.path == path
    assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert format_skips(result) == ""


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("knee", OPTIONS, 3),
        (" knee ", OPTIONS, 3),
        ("Knee", OPTIONS, 3),
        ("D", OPTIONS, 3),
        ("d", OPTIONS, 3),
        ("B", ["A", "B"], 1),
        ("A) B", ["B", "A"], 0),
        ("(b) a", ["B", "A"], 1),
        ("J", [f"option {number}" for number in range(10)], 9),
        ("yes", ["no", " Yes "], 1),
    ],
)
def test_answers_are_texts_or_letters(folder, answer, options, expected):
    (example,) = read_examples(write(folder, row(answer=answer, options=options))).examples
    assert example.answer == expected
    assert all(option == option.strip() for option in example.options)


def test_optional_fields_and_images(folder):
    rows = [row(image=None), row(image=...), row(image=["images/1.png"]), row(qtype="organ", id=5), row(id=None)]
    examples = read_examples(write(folder, *rows)).examples
    assert [example.image is None for example in examples] == [True, True, False, False, False]
    assert [example.id for example in examples] == ["train-1", "train-2", "train-3", "5", "train-5"]
    assert examples[3].kind == "organ"
    assert (examples[0].modality, examples[0].completion) == ("", None)


def test_several_images_in_the_order_of_the_row(folder):
    marked(40).save(folder / "images" / "2.png")
    marked(80, (30, 60)).save(folder / "3.png")
    paths = ["3.png", "images/1.png", "images/2.png"]
    rows = [
        row(image=..., images=paths),
        row(image=None, images=paths[:2]),
        row(image=paths[::-1]),  # as MedVLM-R1's and LLaVA's files have it
        row(image=..., images=paths[:1]),
        row(images=None),
        row(image=..., images=["3.png"] * MAX_IMAGES),
    ]
    examples = read_examples(write(folder, *rows), on_bad_row="error").examples
    expected = [folder / path for path in paths]
    assert [list(example.images) for example in examples] == [
        expected,
        expected[:2],
        expected[::-1],
        expected[:1],
        [folder / "images/1.png"],
        [folder / "3.png"] * MAX_IMAGES,
    ]


BAD_ROWS = {
    "missing image": (row(image="images/none.png"), r"images/none\.png does not exist"),
    "damaged image": (row(image="train.jsonl"), "is not an image"),
    "folder as image": (row(image="images"), "Is a directory"),
    "image above the folder": (row(image="../outside.png"), "leaves the folder"),
    "image above the folder by a detour": (row(image="images/../../outside.png"), "leaves the folder"),
    "absolute image": (row(image="/etc/hostname"), "leaves the folder"),
    "image by a link": (row(image="images/link.png"), "leaves the folder"),
    "image by a linked folder": (row(image="up/outside.png"), "leaves the folder"),
    "links in circles": (row(image="images/circle.png"), r"circle\.png .*(be read|not exist)"),
    "sibling folder": (row(image="../data-2/1.png"), "leaves the folder"),
    "NUL in the path": (row(image="images/1\0.png"), "not a path"),
    "empty path": (row(image=""), "not a path.*write null"),
    "too long path": (row(image="x" * 5000), "too long"),
    "image is a number": (row(image=3), "image is 3, not a text"),
    "no image in the list": (row(image=[]), "its list of images is empty.*null"),
    "no image among several": (row(image=..., images=[]), "its list of images is empty.*null"),
    "image and images": (row(images=["images/1.png"]), r"both image 'images/1\.png' and images \['images/1"),
    "images are no list": (row(image=..., images="images/1.png"), r"images is 'images/1\.png', not a list"),
    "missing image of two": (
        row(image=..., images=["images/1.png", "images/none.png"]),
        r"image 2 of 2: image .*images/none\.png does not exist",
    ),
    "misspelt image of two": (
        row(image=..., images=["images/1.PNG", "images/1.png"]),
        r"images/1\.PNG does not exist: .*'images/1\.png'",
    ),
    "damaged image of three": (
        row(image=["images/1.png", "images/1.png", "train.jsonl"]),
        r"image 3 of 3: image .*train\.jsonl is not an image",
    ),
    "image of two above the folder": (
        row(image=..., images=["../outside.png", "images/1.png"]),
        r"image 1 of 2 '\.\./outside\.png' leaves the folder",
    ),
    "null among several": (row(image=..., images=["images/1.png", None]), "image 2 of 2 is None, not a text"),
    "too many images": (
        row(image=..., images=["images/1.png"] * (MAX_IMAGES + 1)),
        f"{MAX_IMAGES + 1} images, more than {MAX_IMAGES}: .*--slices",
    ),
    "answer not an option": (row(answer="foot"), r"its answer 'foot' is not among .*\['head'"),
    "letter beyond the options": (row(answer="E"), "'E' is not among"),
    "answer missing": (row(answer=...), "it has no answer"),
    "answer is an index": (
        row(answer=3),
        "'3' is not .* 0 it is 'knee'.* 1 .*'abdomen'",
    ),
    "repeated option": (row(options=["head", "knee", "Knee "]), "option 'knee' occurs more than once"),
    "one option": (row(options=["knee"]), "it has 1 option; 2 to 10"),
    "no options": (row(options=[]), "it has 0 options"),
    "options missing": (row(options=...), "it has no options"),
    "options as a text": (row(options="head, knee"), "'head, knee', not a list"),
    "an option is a number": (row(options=["knee", 2]), "option is 2, not a text"),
    "a blank option": (row(options=["knee", " "]), "it has 1 option; 2 to 10"),
    "eleven options": (row(options=[*OPTIONS, *"abcdefg"]), "it has 11 options"),
    "no question": (row(question=...), "it has no question"),
    "null question": (row(question=None), "it has no question"),
    "blank question": (row(question=" \n"), "it has no question"),
    "question is a list": (row(question=["a"]), r"question is \['a'\], not a text"),
    "half a character": (row(question="\ud83d?"), "lone surrogate"),
    "half a character in an option": (row(options=["knee", "\udc00"]), "lone surrogate"),
    "modality is a number": (row(modality=7), "its modality is 7"),
    "completion is a list": (row(completion=["x"]), "its completion is"),
    "id is a list": (row(id=[1]), r"its id is \[1\]"),
    "id is true": (row(id=True), "its id is True"),
    "not an object": ([1, 2], r"not a JSON object but \[1, 2\]"),
    "null": (None, "JSON object but None"),
}


@pytest.fixture
def linked_folder(folder) -> Path:
    (folder / "images" / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "images" / "circle.png").symlink_to(folder / "images" / "circle.png")
    (folder / "up").symlink_to(folder.parent)
    (folder.parent / "data-2").mkdir()
    marked().save(folder.parent / "data-2" / "1.png")
    return folder


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_skipped_and_listed_and_its_neighbours_stay(linked_folder, bad, reason):
    path = write(linked_folder, row(id="first"), bad, row(id="last"))
    result = read_examples(path)
    assert [example.id for example in result.examples] == ["first", "last"]
    (skip,) = result.skipped
    assert (skip.line, skip.id) == (2, "train-2")
    assert re.search(reason, skip.reason), skip.reason
    with pytest.raises(ValueError, match=r"train\.jsonl: .*\(1 of 3 .*\)\. line 2: "):
        read_examples(path, on_bad_row="error")


def test_the_second_row_with_an_id_is_skipped_unless_the_first_was_bad(folder):
    rows = [
        row(id="a"),
        row(id="a"),
        row(id="b", image="images/none.png"),
        row(id="b"),
        row(id="c", answer="?"),
        row(id="c"),
    ]
    result = read_examples(write(folder, *rows))
    assert [example.id for example in result.examples] == ["a", "b", "c"]
    assert [(skip.line, skip.id) for skip in result.skipped] == [(2, "a"), (3, "b"), (5, "c")]
    assert result.skipped[0].reason == "its id was used in line 1 already"


def test_a_link_to_the_data_file_finds_the_images_beside_the_link(folder, tmp_path):
    real = tmp_path / "store.jsonl"
    real.write_text(json.dumps(row()))
    (folder / "linked.jsonl").symlink_to(real)
    assert read_examples(folder / "linked.jsonl").examples[0].image == folder / "images" / "1.png"


def test_a_link_inside_the_folder_is_followed(folder):
    (folder / "images" / "2.png").symlink_to(folder / "images" / "1.png")
    assert len(read_examples(write(folder, row(image="images/2.png"))).examples) == 1


def test_relative_data_paths_give_absolute_image_paths(folder, monkeypatch):
    write(folder, row())
    monkeypatch.chdir(folder)
    assert read_examples(Path("train.jsonl")).examples[0].image == folder / "images" / "1.png"


def test_each_image_is_decoded_once(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr(jsonl, "check_image", lambda path, *, keep: decoded.append(path))
    read_examples(write(folder, *[row() for _ in range(20)]))
    assert decoded == [folder / "images" / "1.png"]


def test_byte_order_mark_blank_lines_crlf_and_no_last_newline(folder):
    path = folder / "train.jsonl"
    text = "\ufeff" + "\r\n\r\n   \r\n".join(json.dumps(row(question=f"Frage {n} ä")) for n in range(2))
    path.write_bytes(text.encode("utf-8"))
    examples = read_examples(path).examples
    assert [(example.id, example.question) for example in examples] == [
        ("train-1", "Frage 0 ä"),
        ("train-4", "Frage 1 ä"),
    ]


def test_a_unicode_line_separator_is_no_end_of_line(folder):
    path = folder / "train.jsonl"
    path.write_text(json.dumps(row(question="a\u2028b\x85c"), ensure_ascii=False), encoding="utf-8")
    assert read_examples(path).examples[0].question == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n \r\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b'{"a": 1}\n{"a": }\n', r"line 2, column 7: .*Expecting value"),
        (b'\n\n{"a": 1', "line 3, column 8"),
        (b'[\n{"a": 1}\n]', "JSON array.*one object per line"),
        (b'{\n"a": 1}', "line 1, column 2.*each line .*one JSON"),
        ('{"question": "Größe"}'.encode("latin-1"), r"is not UTF-8 \(line 1\)"),
        ('{}\n{"question": "é"}'.encode("utf-16"), "is not UTF-8"),
        (b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}", "line 2: .*cannot be read"),
        (b"{}\n" + b"[" * 100_000, "line 2: .*cannot be read"),
    ],
)
def test_a_broken_file_is_an_error_that_names_the_place(folder, content, reason):
    (folder / "train.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train\.jsonl.*{reason}"):
        read_examples(folder / "train.jsonl")


def test_missing_files_and_unknown_settings_are_errors(folder):
    with pytest.raises(ValueError, match=r"none\.jsonl .*No such file"):
        read_examples(folder / "none.jsonl")
    with pytest.raises(ValueError, match="on_bad_row='raise'"):
        read_examples(write(folder, row()), on_bad_row="raise")


def test_only_bad_rows_are_an_error_with_the_first_reasons(folder):
    path = write(folder, row(answer="foot"), row(question=""), row(options=["knee"]), row(image="none.png"))
    with pytest.raises(ValueError, match=r"\(4 of 4 .*\)\. line 1: .*foot.*line 2: .*line 3: ") as error:
        read_examples(path)
    assert "line 4" not in str(error.value)


def test_a_long_value_is_cut_in_the_reason(folder):
    (skip,) = read_examples(write(folder, row(), row(answer="x" * 100_000))).skipped
    assert len(skip.reason) < 500


def test_skips_are_summed_up_in_one_line_by_what_is_wrong(folder):
    bad = [row(id=f"b{number}", question="") for number in range(500)]
    tasks = [row(task=name, answer="x", options=...) for name in ("opne", "opne", "opne")]
    lost = [row(id=f"i{number}", image=f"images/{number}9.png") for number in range(2)]
    result = read_examples(write(folder, row(), *lost, *tasks, *bad, row(answer="foot")))
    assert result.skipped[5] == SkippedRow(7, "b0", "it has no question")
    line = format_skips(result)
    assert line.startswith(
        f"{folder / 'train.jsonl'}: 506 of 507 rows skipped (all are listed in data.json). The 3 most common of 4 reasons: 500 "
        "rows, such as line 7 (b0): it has no question; 3 rows, such as line 4 (train-4): its task 'opne' is unknown"
    )
    assert "; 2 rows, such as line 2 (i0): image " in line
    assert "line 507" not in line
    assert "skipped. The 1 most common of 4 reasons: 500 rows" in format_skips(result, 1, record="")
    assert "(all are listed in data.json). 500 rows, " in format_skips(result, 5)
    assert "; line 507 (train-507): " in format_skips(result, 5)


def test_rows_can_be_refused_before_their_images_are_decoded(folder):
    (folder / "images" / "cut.png").write_bytes(b"no image")
    path = write(folder, row(image="images/cut.png"), row(), row(question=""))
    given: list[list[str]] = []

    def refuse(rows):
        given.append([example.id for example in rows])
        raise ValueError("not these")

    with pytest.raises(ValueError, match="not these"):
        read_examples(path, check=refuse)
    assert given == [["train-1", "train-2"]]


@pytest.mark.parametrize(
    "path",
    [
        "images\\1.png",
        ".\\images\\1.png",
        " images/1.png",
        "images/gr\u00f6\u00dfe.png",
        "images\\gro\u0308\u00dfe.png",
    ],
)
def test_image_paths_of_other_systems_are_followed(folder, path):
    marked().save(folder / "images" / "gro\u0308\u00dfe.png")
    (example,) = read_examples(write(folder, row(image=path))).examples
    assert example.image.is_file()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("Images/1.PNG", "exist: .*'images/1.png', .*differs in case; write"),
        ("images/1.jpg", "exist: .*'images/1.png', .*differs in its ending"),
        ("images/1\u200b.png", "not exist: .*'images/1.png', .*differs in characters"),
        ("images%2f1.png", "does not exist"),
        ("C:\\data\\images\\1.png", "leaves .*: .*'images/1.png' in it; write"),
        ("/home/x/images/1.png", "leaves .*: .*'images/1.png' in it; write"),
        ("..\\outside.png", "leaves the folder [^:]*: copy it"),
        ("images\\..\\..\\outside.png", "leaves the folder [^:]*: copy it"),
    ],
)
def test_a_near_miss_is_shown(folder, path, reason):
    (skip,) = read_examples(write(folder, row(), row(image=path))).skipped
    assert re.search(reason, skip.reason)


def test_a_data_file_whose_name_differs_is_told(folder):
    write(folder, row())
    with pytest.raises(ValueError, match=r"Train\.jsonl .*'.*/train\.jsonl'"):
        read_examples(folder / "Train.jsonl")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["good", "no object", "bad", "blank", "spaces"]), max_size=12))
def test_rows_and_skips_are_the_lines_that_are_not_blank(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("counted") / "a.jsonl"
    texts = {
        "good": json.dumps(row(image=None)),
        "bad": json.dumps(row(image=None, answer="foot")),
        "no object": '["\u2028 \x85"]',
        "blank": "",
        "spaces": " \t\r",
    }
    path.write_bytes("\n".join(texts[kind] for kind in kinds).encode())
    if "good" not in kinds:
        with pytest.raises(ValueError, match=r"is empty|no row "):
            read_examples(path)
        return
    result = read_examples(path)
    lines = sorted([*result.lines.values(), *(skip.line for skip in result.skipped)])
    assert lines == [number for number, kind in enumerate(kinds, 1) if kind not in ("blank", "spaces")]
    assert len(result.examples) == kinds.count("good")


@pytest.mark.parametrize(
    "fault", ['{"a": 1} {"b": 2}', '{"a": 1', '{"a": 1 "b": 2}', '{"a": 1},', "{'a': 1}", "\ufeff{}"]
)
def test_a_line_that_is_not_one_value_is_never_passed_over(folder, fault):
    path = folder / "train.jsonl"
    path.write_text(json.dumps(row()) + "\n" + fault + "\n" + json.dumps(row()))
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2"):
        read_examples(path)
