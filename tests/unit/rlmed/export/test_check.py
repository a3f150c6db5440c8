"""What counts as a difference between two answers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlmed.core.types import Example
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.export.check import Answer, Reference, choose_questions, transformers_answers
from rlmed.export.folder import write_folder
from rlmed.export.source import Source
from rlmed.models.families import unsampleable_token_ids
from rlmed.models.policy import load_config

EXAMPLES = tuple(Example(str(i), None, f"Which of {i}?", ("liver", "lung"), answer=0) for i in range(3))
LIMIT = 12


@pytest.fixture
def changed(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`changed("llama", change)`: a model's folder after `change(rows of its vocabulary)`."""

    def make(family: str, change: Callable[[torch.Tensor], None]) -> Path:
        folder = shutil.copytree(tiny_folder(family), tmp_path / "model")
        PromptRenderer(*load_processor(folder), max_prompt_tokens=512).save(folder)
        weights = load_file(folder / "model.safetensors")
        for name in weights:
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                change(weights[name])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def test_tokens_that_are_equally_likely_are_a_tie_and_others_a_difference(changed: Callable[..., Path]) -> None:
    def twins(rows: torch.Tensor) -> None:
        rows[150:250] = rows[50:150]

    reference = Reference(changed("llama", twins), "float32", EXAMPLES, LIMIT)
    own = reference.answers
    assert reference.differences("me", own) == []
    number, place = next(
        (number, place)
        for number, answer in enumerate(own)
        for place, token in enumerate(answer.token_ids)
        if 50 <= token < 250
    )
    token = own[number].token_ids[place]

    def other(token: int) -> list[Answer]:
        ids = [*own[number].token_ids]
        ids[place] = token
        answers = list(own)
        answers[number] = dataclasses.replace(own[number], token_ids=tuple(ids), text="other")
        return answers

    (tie,) = reference.differences("me", other(token + 100 if token < 150 else token - 100))
    assert tie.tie
    assert tie.id == str(number)
    (difference,) = reference.differences("me", other(40))
    assert not difference.tie
    assert "apart where they part" in difference.why


def test_an_answer_that_ends_earlier_is_a_difference(tiny_folder: Callable[..., Path]) -> None:
    reference = Reference(tiny_folder("llama"), "float32", EXAMPLES, LIMIT)
    longest = max(range(3), key=lambda number: len(reference.answers[number].token_ids))
    answers = list(reference.answers)
    cut = answers[longest].token_ids[:-1]
    answers[longest] = dataclasses.replace(answers[longest], token_ids=cut, text="cut")
    (difference,) = reference.differences("me", answers)
    assert (difference.id, difference.tie) == (str(longest), False)


def test_another_prompt_is_a_difference_even_if_the_answer_is_the_same(tiny_folder: Callable[..., Path]) -> None:
    reference = Reference(tiny_folder("llama"), "float32", EXAMPLES[:1], LIMIT)
    (own,) = reference.answers
    (difference,) = reference.differences("me", [dataclasses.replace(own, prompt_ids=own.prompt_ids[:-1])])
    assert f"of {len(own.prompt_ids) - 1} tokens and not {len(own.prompt_ids)}" in difference.why
    assert not difference.tie


def test_transformers_keeps_to_the_tokens_of_training_by_the_generation_settings(
    changed: Callable[..., Path], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Where tokens that stand for images are the likeliest by far, which no training made so."""
    banned = list(unsampleable_token_ids(load_config(tiny_folder("qwen2_vl"))))
    (likeliest, *_), *_ = (
        answer.token_ids for answer in Reference(tiny_folder("qwen2_vl"), "float32", EXAMPLES, LIMIT).answers
    )

    def likely(rows: torch.Tensor) -> None:
        rows[banned] = 2 * rows[likeliest]

    folder, out = changed("qwen2_vl", likely), tmp_path / "out"
    out.mkdir()
    write_folder(out, Source(folder, None, None), "float32")
    reference = Reference(folder, "float32", EXAMPLES, LIMIT)
    assert reference.differences("transformers", transformers_answers(out, reference, EXAMPLES, LIMIT)) == []
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings.pop("suppress_tokens") == banned
    (out / "generation_config.json").write_text(json.dumps(settings))
    free = transformers_answers(out, reference, EXAMPLES, LIMIT)
    assert {token for answer in free for token in answer.token_ids} & {*banned}


@pytest.mark.parametrize("tasks", [("labels",), ("choice", "labels")])
def test_other_tasks_are_asked_as_in_training(
    changed: Callable[..., Path], tmp_path: Path, tasks: tuple[str, ...]
) -> None:
    """By the chat template around a question with its list; of several tasks, by the whole turn."""
    folder, out = changed("llama", lambda rows: None), tmp_path / "out"
    out.mkdir()
    truth = {"labels": ["cyst"], "known": ["cyst", "mass"]}
    labels = Example("labels", None, "Which findings?", task="labels", truth=truth)
    examples = [labels, *EXAMPLES[:1]][: len(tasks)]
    exported = write_folder(out, Source(folder, None, None), "float32", tasks)
    reference = Reference(folder, "float32", examples, LIMIT, wrapped=exported.wrapped)
    assert "cyst, mass" in reference.prompts[0].text
    assert reference.differences("transformers", transformers_answers(out, reference, examples, LIMIT)) == []


def test_questions_come_from_each_file_in_turn(tmp_path: Path) -> None:
    for name, count in (("a", 4), ("b", 1)):
        rows = [{"id": f"{name}{i}", "question": "?", "options": ["x", "y"], "answer": "x"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert [example.id for example in choose_questions(files, 4)] == ["a0", "b0", "a1", "a2"]
    assert len(choose_questions(files, 20)) == 5
