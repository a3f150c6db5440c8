"""The embedded base is as it should be, and its rebuilding command works whole on a few images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from rlmed import tiny_base
from rlmed.core.parsing import evaluated_letter, has_format
from rlmed.core.types import Example, RolloutRequest, SamplingParams
from rlmed.data.phantom.studies import make_example, render, sample_study
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.models.loading import model_folder
from rlmed.models.policy import load_policy
from rollout.native.engine import NativeEngine

BASE = "embedded:tiny_base"


def test_the_shipped_base_is_small_and_really_qwen2_vl() -> None:
    folder = model_folder(BASE)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12 * 2**20
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.architectures == ["Qwen2VLForConditionalGeneration"]
    assert sum(parameter.numel() for parameter in model.parameters()) < 6_000_000


def test_the_shipped_base_knows_the_format_and_sees_what_is_easy(tmp_path: Path) -> None:
    """Far above chance on anatomy, the careful reader's field; the README has the accuracies."""
    examples: list[Example] = []
    for index in range(40):
        rng = np.random.default_rng([7, index])
        study = sample_study(rng, "MRI", "anatomy")
        path = tmp_path / f"{index}.png"
        Image.fromarray(render(study, rng)).save(path)
        examples.append(make_example(study, "anatomy", f"{index}", path, rng, index % 4))
    folder = model_folder(BASE)
    renderer = PromptRenderer(*load_processor(folder), max_prompt_tokens=256)
    engine = NativeEngine(load_policy(folder), renderer.decode)
    for index, example in enumerate(examples):
        engine.submit(
            RolloutRequest(index, renderer.render(example), 1, SamplingParams(temperature=0.0, max_tokens=64))
        )
    texts = {}
    while engine.busy:
        texts |= {group.request.index: group.completions[0].text for group in engine.step()}
    assert sum(has_format(text) for text in texts.values()) >= 36
    assert sum(evaluated_letter(texts[i]) == example.letter for i, example in enumerate(examples)) >= 30


@pytest.mark.slow
def test_the_build_command_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # some processors need a minute for a few products in bfloat16
    stages = tuple(dataclasses.replace(stage, dtype="float32") for stage in tiny_base.STAGES)
    monkeypatch.setattr(tiny_base, "STAGES", stages)
    target = tmp_path / "base"
    sizes = ["--lookup-rows", "8", "--studies", "2", "--reader-studies", "2"]
    tiny_base.main(["--target", str(target), "--work", str(tmp_path / "work"), *sizes])
    model = AutoModelForImageTextToText.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    start = AutoModelForImageTextToText.from_pretrained(tmp_path / "work" / "start", dtype=torch.bfloat16)
    trained = model.state_dict()
    # matrices only: five steps move a gain of 1 by less than bfloat16 can tell
    unmoved = [name for name, tensor in start.state_dict().items() if tensor.ndim > 1 and tensor.equal(trained[name])]
    assert unmoved == []
    PromptRenderer(*load_processor(target), max_prompt_tokens=256)
