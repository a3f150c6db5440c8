"""What a run starts from: versions of software, its data, and what a resumed run takes over."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest

from rlmed.core.config.composing import compose_config
from rlmed.core.types import Example
from rlmed.data.examples import ReadResult, SkippedRow
from rlmed.data.loading import DataFile
from rlmed.recording.inputs import chosen_compiled, chosen_dtype, chosen_onednn, write_data, write_versions

EXAMPLE = Example("mri-7", Path("/data/7.png"), "Which part?", ("head", "knee"), answer=1, modality="MRI")


def test_versions_name_what_ran_and_nothing_private(tmp_path):
    write_versions(tmp_path / "run", compose_config("train", ["model.onednn=[few_rows]"]).model)
    text = (tmp_path / "run" / "versions.json").read_text()
    versions = json.loads(text)
    threads = {"cores", "usable_cores", "cpu_quota", "torch_threads", "omp_wait_policy"}
    assert set(versions) == {
        "python",
        "platform",
        "cpu",
        "cpu_capability",
        *threads,
        "dtype",
        "onednn",
        "compiled_decode",
        "cuda_device",
        "packages",
        "commit",
        "toy_model",
    }
    assert versions["python"] == platform.python_version()
    assert versions["packages"]["numpy"] == np.__version__
    assert versions["cpu"]
    assert versions["cores"] >= 1
    assert 1 <= versions["usable_cores"] <= versions["cores"]
    words = text.replace('"', " ").split()
    assert platform.node() not in words
    assert str(Path.home()) not in text


@pytest.mark.parametrize("compiled", [True, False])
def test_a_resumed_run_multiplies_as_before_on_the_same_processor_alone(tmp_path, caplog, compiled):
    assert chosen_onednn(tmp_path) is None
    assert chosen_compiled(tmp_path) is None
    settings = ["model.onednn=[few_rows]", f"model.compiled_decode={compiled}"]
    path = write_versions(tmp_path, compose_config("train", settings).model)
    assert chosen_onednn(tmp_path) == ("few_rows",)
    assert chosen_compiled(tmp_path) is compiled
    versions = json.loads(path.read_text())
    for changed in (
        versions | {"cpu": "another"},
        versions | {"cpu_capability": "NONE"},
        versions | {"packages": versions["packages"] | {"torch": "2.0"}},
        {key: value for key, value in versions.items() if key not in ("onednn", "compiled_decode")},
    ):
        path.write_text(json.dumps(changed))
        caplog.clear()
        assert chosen_onednn(tmp_path) is None
        assert chosen_compiled(tmp_path) is (None if "onednn" in changed else False)
        assert ("chosen anew" in caplog.text) == ("onednn" in changed)


@pytest.mark.parametrize(("dtype", "chosen"), [("auto", None), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_a_resumed_run_keeps_its_dtype_on_every_processor(tmp_path, dtype, chosen):
    assert chosen_dtype(tmp_path) is None
    path = write_versions(tmp_path, compose_config("train", [f"model.dtype={dtype}"]).model)
    versions = json.loads(path.read_text())
    for other in (versions, versions | {"cpu": "another"}):
        path.write_text(json.dumps(other))
        assert chosen_dtype(tmp_path) == chosen
    del versions["dtype"]  # as earlier versions wrote it
    path.write_text(json.dumps(versions))
    assert chosen_dtype(tmp_path) is None


def test_data_counts_the_rows_that_keep_the_order_of_their_options(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = tuple(Example(str(n), None, "?", ("x", last), 0) for n, last in enumerate(("y", "both", "all of the above")))
    file = DataFile("train", path, ReadResult(path, rows, (), "abc", {}), rows, ())
    write_data(tmp_path, [file])
    assert json.loads((tmp_path / "data.json").read_text())["files"][0]["kept_order"] == 2


def test_rows_beyond_the_limit_are_counted(tmp_path):
    example = EXAMPLE
    read = ReadResult(tmp_path / "a.jsonl", (example,) * 9, (SkippedRow(2, "b", "no question"),), "abc123", {"a": 1})
    dropped = (SkippedRow(3, "c", "prompt too long"),)
    write_data(tmp_path, [DataFile("a", read.path, read, (example,) * 4, dropped)])
    (entry,) = json.loads((tmp_path / "data.json").read_text())["files"]
    assert (entry["read"], entry["rows"], entry["beyond_limit"], len(entry["skipped"])) == (10, 4, 4, 2)


def test_data_lists_each_file_with_its_skipped_rows(tmp_path):
    path = tmp_path / "train.jsonl"
    example = EXAMPLE
    read = ReadResult(path, (example, example), (SkippedRow(2, "b", "no question"),), "abc123", {"a": 1})
    file = DataFile("train", path, read, (example,), (SkippedRow(9, "c", "prompt too long"),))
    write_data(tmp_path, [file])
    assert json.loads((tmp_path / "data.json").read_text()) == {
        "files": [
            {
                "name": "train",
                "path": str(path),
                "sha256": "abc123",
                "read": 3,
                "rows": 1,
                "kept_order": 0,
                "beyond_limit": 0,
                "most_images": 1,
                "tasks": ["choice"],
                "skipped": [
                    {"line": 2, "id": "b", "reason": "no question"},
                    {"line": 9, "id": "c", "reason": "prompt too long"},
                ],
            }
        ]
    }
