"""A model is known for the embedded toy, or for one that was trained from it, and no other is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.models.loading import model_folder
from rlmed.models.tiny.toy import is_toy


def test_the_embedded_model_is_one_and_so_is_every_checkpoint_of_it(base_copy: Path, tmp_path: Path) -> None:
    assert is_toy(model_folder("embedded:tiny_base"))
    assert is_toy(base_copy)
    folder = base_copy
    # what a run writes beside the weights, of a model that a run wrote
    for stage in ("aligned", "sft", "rl"):
        renderer = PromptRenderer(*load_processor(folder), max_prompt_tokens=256)
        folder = tmp_path / stage
        folder.mkdir()
        shutil.copy(base_copy / "config.json", folder)
        renderer.save(folder)
        assert is_toy(folder)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3"])
def test_another_model_is_none(family: str, tiny_folder: Callable[..., Path]) -> None:
    assert not is_toy(tiny_folder(family))


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"model": null}', '{"model": {"vocab": {"a": 0}}}', "\udcff"]
)
def test_no_tokenizer_or_a_broken_one_is_none(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert not is_toy(tmp_path)
    assert not is_toy(Path("Qwen/Qwen2-VL-2B-Instruct"))


def test_a_token_more_is_another_model(base_copy: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(base_copy / "tokenizer.json", tmp_path / "tokenizer.json"))
    content = json.loads(path.read_text())
    content["model"]["vocab"]["haemorrhage"] = len(content["model"]["vocab"])
    path.write_text(json.dumps(content))
    assert not is_toy(tmp_path)
