"""The prompt of training in a chat template: once, as rlmed writes it, whatever it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlmed.cluster.engines import recorded_renderer
from rlmed.core.types import Example
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.export.template import own_template, with_training_prompt

PROMPTS = {
    "before and after": "Look.\n{question}\nAnswer in <answer></answer>.",
    "Jinja's own marks": "{{ x }} {% if y %} {# z #} '{question}' \"%}\" \\n end",
    "other letters": "Frage 😀 é: {question} 結束",
    "words of the template": "GENERAL AROUND SWITCH TURN\n{question}",
    "nothing": "{question}",
}
BARE = "Which organ?\nA) liver\nB) lung"


def renderer_of(folder: Path, **settings: Any) -> PromptRenderer:
    return PromptRenderer(*load_processor(folder), max_prompt_tokens=2048, **settings)


def rendered(renderer: PromptRenderer, template: str, content: Any, *others: dict[str, Any], **variables: Any) -> str:
    messages = [{"role": "user", "content": content}, *others]
    return str(
        renderer.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
        )
    )


@pytest.fixture(params=["qwen2_vl", "llama"])
def folder(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder(request.param)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_bare_question_gets_the_prompt_of_training_once(folder: Path, prompt: str) -> None:
    renderer = renderer_of(folder, template=prompt)
    template = with_training_prompt(renderer)
    parts = [] if renderer.pictures is None else [{"type": "image"}]
    content = [*parts, {"type": "text", "text": BARE}]
    full = prompt.replace("{question}", BARE)
    expected = rendered(renderer, own_template(renderer.tokenizer), [*parts, {"type": "text", "text": full}])
    assert full in expected
    assert rendered(renderer, template, content) == expected
    # it is there already
    assert rendered(renderer, template, [*parts, {"type": "text", "text": full}]) == expected
    assert rendered(renderer, template, full) == rendered(renderer, template, BARE)
    # it is not wanted
    bare = rendered(renderer, own_template(renderer.tokenizer), content)
    assert rendered(renderer, template, content, training_prompt=False) == bare


def test_only_the_first_question_of_a_conversation_gets_it(folder: Path) -> None:
    renderer = renderer_of(folder, template=PROMPTS["before and after"])
    others = ({"role": "assistant", "content": "liver"}, {"role": "user", "content": "Sure?"})
    text = rendered(renderer, with_training_prompt(renderer), BARE, *others)
    assert text.count("Look.") == 1
    assert text.index("Look.") < text.index(BARE) < text.index("Sure?")


def test_text_around_several_pictures_is_one_question(tiny_folder: Callable[..., Path]) -> None:
    renderer = renderer_of(tiny_folder("qwen2_vl"), template="Look. {question} Answer.")
    content = [
        {"type": "text", "text": "First "},
        {"type": "image"},
        {"type": "text", "text": " second "},
        {"type": "image"},
        {"type": "text", "text": " which?"},
    ]
    text = rendered(renderer, with_training_prompt(renderer), content)
    seen = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"Look. First {seen} second {seen} which? Answer.<|im_end|>" in text


def test_a_modality_has_its_own_prompt(folder: Path) -> None:
    renderer = renderer_of(folder, template="{question} Any.", by_modality={"CT": "CT: {question}"})
    template = with_training_prompt(renderer)
    assert f"CT: {BARE}" in rendered(renderer, template, BARE, modality="CT")
    assert f"{BARE} Any." in rendered(renderer, template, BARE, modality="PET")
    assert f"{BARE} Any." in rendered(renderer, template, BARE)


def test_rlmed_writes_the_same_prompt_from_the_exported_template_whatever_the_prompt(
    folder: Path, tmp_path: Path
) -> None:
    trained, other = (renderer_of(folder, template=text) for text in ("Look. {question}", "{question} Say B."))
    example = Example("1", None, "Which organ?", ("liver", "lung"), answer=0)
    expected = [renderer.render(example).token_ids.tolist() for renderer in (trained, other)]
    trained.tokenizer.chat_template = other.tokenizer.chat_template = with_training_prompt(trained)
    assert [renderer.render(example).token_ids.tolist() for renderer in (trained, other)] == expected
    assert expected[0] != expected[1]


def test_a_second_export_replaces_the_prompt_of_the_first(folder: Path) -> None:
    first = renderer_of(folder, template="First. {question}")
    own = first.tokenizer.chat_template
    second = renderer_of(folder, template="Second. {question}")
    second.tokenizer.chat_template = with_training_prompt(first)
    assert own_template(second.tokenizer) == own
    text = rendered(second, with_training_prompt(second), BARE)
    assert f"Second. {BARE}" in text
    assert "First." not in text


def test_a_template_that_cannot_be_written_before_is_refused(base_copy: Path) -> None:
    renderer = recorded_renderer(base_copy)
    own = renderer.tokenizer.chat_template
    assert isinstance(own, str)
    renderer.tokenizer.chat_template = "{% if rlmed is defined %}{{ raise_exception('no') }}{% endif %}" + own
    with pytest.raises(ValueError, match=r"chat template of model .* no"):
        with_training_prompt(renderer)
    renderer.tokenizer.chat_template = own.replace(
        "'<|im_start|>' +", "(rlmed_around | default('') | string) ~ '<|im_start|>' ~"
    )
    with pytest.raises(ValueError, match="changes what it is given"):
        with_training_prompt(renderer)


def test_another_task_has_its_own_prompt_and_several_have_none(folder: Path) -> None:
    prompts: dict[str, Any] = {"template": "{question} A letter.", "by_modality": {"CT": "CT: {question}"}}
    renderer = renderer_of(folder, **prompts, by_task={"open": "{question} A word."})
    one = with_training_prompt(renderer, "open")
    assert f"{BARE} A word." in rendered(renderer, one, BARE, modality="CT")
    assert "single-letter" not in with_training_prompt(renderer, "grounding")
    assert "[[x0, y0, x1, y1], ...]" in rendered(renderer, with_training_prompt(renderer, "grounding"), BARE)
    assert with_training_prompt(renderer, None) == own_template(renderer.tokenizer)
