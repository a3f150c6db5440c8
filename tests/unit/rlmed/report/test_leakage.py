"""What the page has on leaking rows: accuracy without them by hand, a bounded choice of pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlmed.data.leakage.findings import FileLeakage, Leak, LeakageReport
from rlmed.evaluation.records import EvalRow
from rlmed.report.leakage import PAIRS, accuracy, show_leakage
from rlmed.report.rollouts import Pictures
from tests.unit.rlmed.data.pictures import picture, save


def row(file: str, name: str, right: bool, control: str = "none") -> EvalRow:
    return EvalRow(
        file=file, id=name, control=control, image=None, question_type="", question="?", options=("a", "b"), answer="A",
        completion="", predicted_letter=None, correct=right, format=False, tokens=1, finish_reason="stop",
    )  # fmt: skip


def leak(file: str, number: int, image: Path | None, kind: str = "file") -> Leak:
    path = None if image is None else str(image)
    return Leak(file, kind, path, path, 1.0, (f"{file}-{number}",), tuple(f"t{i}" for i in range(6)), (f"{file}-0",))  # type: ignore[arg-type]


def summary(name: str, leaking: int) -> FileLeakage:
    return FileLeakage(name, 10, 10, leaking, 1, {"file": leaking} if leaking else {}, 2)


def test_accuracy_without_the_leaking_rows() -> None:
    rows = [row("ct", f"ct-{i}", i < 6) for i in range(8)]
    others = [row("ct", "ct-7", True, "blank"), row("mri", "ct-0", False)]
    whole, rest = (
        accuracy([*rows, *others], "ct"),
        accuracy([*rows, *others], "ct", frozenset({"ct-0", "ct-1", "ct-7"})),
    )
    assert whole is not None
    assert rest is not None
    assert (whole.correct, whole.rows) == (6, 8)
    assert (rest.correct, rest.rows) == (4, 5)
    assert accuracy(rows, "mri") is None


def test_files_that_leak_with_their_pairs(tmp_path: Path) -> None:
    image = save(tmp_path, "a.png", picture(0))
    leaks = (leak("ct", 0, image), leak("ct", 1, None, "text"))
    report = LeakageReport(600, 300, (summary("ct", 2), summary("mri", 0)), leaks)
    pictures = Pictures()
    shown = show_leakage(report.to_json(), [row("ct", f"ct-{i}", i == 0) for i in range(3)], pictures)
    assert shown is not None
    assert (shown["leaking_rows"], shown["doubtful"], shown["hidden"]) == (2, 4, 1)
    (file,) = shown["files"]
    assert (file["accuracy"].correct, file["without"].correct, file["without"].rows) == (1, 0, 1)
    assert file["kinds"] == "2 same file"
    (pair,) = shown["pairs"]
    assert [side["ids"] for side in pair["sides"]] == ["ct-0", "t0, t1, t2, t3 and 2 more"]
    assert pair["sides"][0]["picture"]["index"] == 0
    assert len(pictures.uris) == 1


def test_a_pair_says_which_of_several_images_it_shows(tmp_path: Path) -> None:
    image = save(tmp_path, "a.png", picture(0))
    found = dataclasses.replace(leak("ct", 0, image), test_place="2 of 3")
    shown = show_leakage(LeakageReport(1, 1, (summary("ct", 1),), (found,)).to_json(), [], Pictures())
    assert shown is not None
    assert [side["name"] for side in shown["pairs"][0]["sides"]] == ["image 2 of 3 of test", "training"]


def test_pairs_are_bounded_and_every_file_has_its_share(tmp_path: Path) -> None:
    leaks = [leak("ct", i, tmp_path / f"c{i}.png") for i in range(40)] + [leak("ct", 0, tmp_path / "c0.png", "near")]
    leaks += [leak("mri", i, tmp_path / f"m{i}.png") for i in range(3)]
    report = LeakageReport(1, 1, (summary("ct", 40), summary("mri", 3)), tuple(leaks))
    shown = show_leakage(report.to_json(), [], Pictures())
    assert shown is not None
    assert len(shown["pairs"]) == PAIRS
    assert [pair["file"] for pair in shown["pairs"]].count("mri") == 3
    assert shown["hidden"] == len(leaks) - PAIRS
    assert shown["files"][0]["without"] is None


def test_nothing_was_compared() -> None:
    assert show_leakage(None, [], Pictures()) is None
