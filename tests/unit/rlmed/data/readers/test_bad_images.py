"""Whatever is wrong with an image costs its row, whichever reader of images meets it."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlmed.data.prepare.prepared_data import PreparedData
from rlmed.prepare import parse_arguments, prepare


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def png_bomb() -> bytes:
    """A sound PNG file of 10 KB that says 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(60_001 * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def one_colour() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (30, 30, 30)).save(stream, "PNG")
    return stream.getvalue()


def nothing_finite() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((64, 64), np.nan, dtype=np.float32)).save(stream, "TIFF")
    return stream.getvalue()


FILES = {
    "good.png": png(),
    "grey.png": one_colour(),
    "nan.tif": nothing_finite(),
    "cut.png": png()[:2000],
    "bomb.png": png_bomb(),
    "text.png": b"Hello",
    "empty.png": b"",
}
EXPECTED = {
    "good.png": "",
    "cut.png": "is truncated or damaged",
    "bomb.png": "more than 170000000 pixels: scale it down",
    "text.png": "is not an image, or its header is damaged",
    "empty.png": "is an empty file",
    "grey.png": "grey.png shows nothing: it is all of one colour (30 of 255)",
    "nan.tif": "nan.tif cannot be displayed faithfully: none of its values is a finite number",
    "missing.png": "does not exist",
    "folder.png": "does not exist",
    "x" * 300 + ".png": "does not exist",
    "link.png": "leaves the folder",
    "../outside.png": "leaves the folder",
    "a/../../outside.png": "leaves the folder",
    "/etc/hostname": "leaves the folder",
    "good.png\0": "not a path",
}
"""The reason by what a row calls its image."""


def csv(folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
    lines = [f"{name},Q{number},x,y,A\n" for number, name in enumerate(names)]
    (folder / "train.csv").write_text("image,question,A,B,answer\n" + "".join(lines))
    return folder / "train.csv", folder


def huggingface(folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = [
        {"image": name, "question": f"Q{number}", "options": ["x", "y"], "answer": "x"}
        for number, name in enumerate(names)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    return folder, folder


def medvlm_r1(folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
    rows = [
        {"image": [name], "question": f"Q{number}", "options": ["x", "y"], "answer": "x", "subset": "MRI"}
        for number, name in enumerate(names)
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    return folder / "test.json", folder


def omnimedvqa(folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
    rows = [
        {
            "question_id": f"q{number}",
            "question": f"Q{number}",
            "gt_answer": "x",
            "image_path": name,
            "option_A": "x",
            "option_B": "y",
            "modality_type": "CT",
        }
        for number, name in enumerate(names)
    ]
    (folder / "QA_information" / "Open-access").mkdir(parents=True)
    (folder / "QA_information" / "Open-access" / "a.json").write_text(json.dumps(rows))
    return folder, folder


def vqa_rad(folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
    rows = [
        {"qid": number, "image_name": name, "question": f"Q{number}", "answer": "Yes"}
        for number, name in enumerate(names)
    ]
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    return folder, folder / "VQA_RAD Image Folder"


def slake(folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
    rows = [
        {"qid": number, "img_name": name, "question": f"Q{number}", "answer": "Yes", "q_lang": "en"}
        for number, name in enumerate(names)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder, folder / "imgs"


def pmc_vqa(folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
    lines = [f"{name},Q{number},x,A:x,B:y\n" for number, name in enumerate(names)]
    (folder / "train.csv").write_text("Figure_path,Question,Answer,Choice A,Choice B\n" + "".join(lines))
    return folder / "train.csv", folder / "images"


@pytest.mark.parametrize("publish", [csv, huggingface, medvlm_r1, omnimedvqa, vqa_rad, slake, pmc_vqa])
def test_a_bad_image_costs_its_row(tmp_path, publish: Callable[[Path, Sequence[str]], tuple[Path, Path]]):
    folder = tmp_path / "source"
    folder.mkdir()
    source, images = publish(folder, list(EXPECTED))
    (images / "folder.png").mkdir(parents=True)
    for name, content in FILES.items():
        (images / name).write_bytes(content)
    (tmp_path / "outside.png").write_bytes(png())
    (images / "link.png").symlink_to(tmp_path / "outside.png")
    (images.parent / "outside.png").write_bytes(png())
    layout: PreparedData = prepare(
        parse_arguments([publish.__name__, "--source", str(source), "--out", str(tmp_path / "out")])
    )
    (split,) = layout.splits.values()
    assert (split.rows, split.images) == (1, 1)
    wanted = list(EXPECTED.values())[1:]
    assert len(layout.skipped) == len(wanted)
    for row, reason in zip(layout.skipped, wanted, strict=True):
        assert reason in row.reason
        assert str(tmp_path) not in row.reason
