"""Chat templates as people change them: some fail to render, some have begun the completion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlmed.cluster.engines import open_model
from rlmed.core.prefill import remaining
from rlmed.core.types import Example
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.data.templates import PAPER_TEMPLATE

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TURNS = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'text' %}{{- part['text'] }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
)
OPENING = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"


def opening(prefill: str) -> str:
    """A generation prompt that has written `prefill` already."""
    return OPENING.replace("assistant\n", f"assistant\n{prefill}")


def renderer_of(folder: Path, chat_template: str, **settings: object) -> PromptRenderer:
    (folder / "chat_template.jinja").write_text(chat_template)
    return PromptRenderer(*load_processor(folder), **{"max_prompt_tokens": 512, **settings})  # type: ignore[arg-type]


@pytest.fixture
def example(tmp_path: Path) -> Example:
    Image.new("RGB", (56, 56), (90, 90, 90)).save(tmp_path / "1.png")
    return Example("q1", tmp_path / "1.png", "Which <think>organ</think> is shown?", ("liver", "spleen"), 0)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{{ raise_exception('Roles must alternate\n user/assistant') }}" + TURNS + OPENING,
            "Roles must alternate user/assist",
        ),
        ("{% if messages %}" + TURNS, "TemplateSyntaxError"),
        ("{{ " + TURNS, "TemplateSyntaxError"),
        (TURNS + "{{ tools_in_user_message.first }}", "'tools_in_user_message' is undefined"),
        (TURNS + "{{ messages[7]['content'] }}", "has no element 7|UndefinedError"),
        (TURNS + "{{ 1 / 0 }}", "ZeroDivisionError"),
        (TURNS + "{{ 'a' + 1 }}", "TypeError"),
        (TURNS + "{{ messages | no_such_filter }}", "no_such_filter"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}" + TURNS, "RecursionError"),
        (TURNS + "{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        (TURNS + "{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError|UndefinedError"),
        ("{% include 'other.jinja' %}", "no loader|TypeError"),
        ("", "does not write the question"),
        (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe.<|im_end|>\n" + OPENING,
            "write the question",
        ),
        (TURNS.replace("part['text']", "part['text'] | upper") + OPENING, "write the question"),
        (TURNS.replace("<|image_pad|>", "<image>") + OPENING, r"writes 0 image placeholders .*where 1 belong"),
        (TURNS.replace("<|image_pad|>", "<|image_pad|><|image_pad|>") + OPENING, r"writes 2 image placeholders"),
        # a template for text alone
        (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + OPENING,
            "image pl|question",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line_with_place_and_advice(base_copy, template, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        renderer_of(base_copy, template)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert "chat_template.jinja" in message
    assert str(base_copy) in message
    assert "copy the one" in message


def test_a_template_that_minds_one_question_costs_that_row_alone(base_copy, example):
    raising = "{% if 'bladder' in messages[0]['content'] | string %}{{ raise_exception('no bladders') }}{% endif %}"
    renderer = renderer_of(base_copy, raising + TURNS + OPENING, template="{question}")
    other = Example("q2", example.image, "Which organ?", ("liver", "kidney"), 0)
    assert renderer.render(other).text
    with pytest.raises(ValueError, match="no bladders"):
        renderer.render(Example("q3", example.image, "Which organ?", ("liver", "bladder"), 0))


@pytest.mark.parametrize(
    "prefill",
    ["", "<think>", "<think>\n", "<think>\n\n</think>\n\n", "</think>\n\n", "<answer>", "<think></think><answer>"],
)
def test_what_the_template_has_written_of_the_completion(base_copy, example, prefill):
    renderer = renderer_of(base_copy, TURNS + opening(prefill))
    prompt = renderer.render(example)
    assert prompt.prefill == prefill
    assert prompt.text.endswith(f"<|im_start|>assistant\n{prefill}")
    assert "<think>...</think>" in PAPER_TEMPLATE  # the user's text, which does not count
    assert renderer.render(Example("q2", None, "Which?", ("a", "b"), 0)).prefill == prefill


@pytest.mark.parametrize(
    ("prefill", "asked", "said"),
    [
        ("", PAPER_TEMPLATE, False),
        ("<think>\n", PAPER_TEMPLATE, False),
        ("<think>\n\n</think>\n\n", PAPER_TEMPLATE, True),
        ("</think>\n\n", PAPER_TEMPLATE, True),
        ("<answer>", PAPER_TEMPLATE, True),
        ("<answer>", "{question} Only <answer>A</answer>", False),
        ("<think></think>", "{question} Only <answer>A</answer>", False),
    ],
)
def test_a_template_without_room_for_the_reasoning_that_is_asked_for(base_copy, prefill, asked, said):
    doubt = renderer_of(base_copy, TURNS + opening(prefill), template=asked).prefill_doubt()
    assert (doubt is not None) is said
    assert not said or (repr(prefill) in doubt and "chat_template.jinja" in doubt and "generation prompt" in doubt)


@pytest.mark.parametrize(
    "template",
    [
        # the flag is not looked at: the turn is always opened
        TURNS + "<|im_start|>assistant\n<think>\n",
        # turns shown first
        "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n<think>a</think><answer>A</answer><|im_end|>\n"
        + TURNS
        + opening("<think>\n"),
        # a reminder after the question
        TURNS.replace("{{- '<|im_end|>", "{{- ' Use <think>…</think>.<|im_end|>") + opening("<think>\n"),
        # turns without any control token
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %}USER: {{ part['text'] }}"
        "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endfor %}"
        "\nUse <think>.\n{% if add_generation_prompt %}ASSISTANT: <think>\n{% endif %}",
    ],
)
def test_the_prefill_is_found_wherever_turns_are_opened(base_copy, example, template):
    # jinja drops the last line break of a template unless it is told to keep it
    prompt = renderer_of(base_copy, template + "\n").render(example)
    assert prompt.prefill.rstrip() == "<think>"


@pytest.mark.parametrize("tail", ["<|im_end|>\n", " Reason in <think> tags, then write <answer>.<|im_end|>\n"])
def test_tags_in_the_users_turn_are_no_prefill(base_copy, example, tail):
    template = TURNS.replace("'<|im_end|>\n'", repr(tail)) + OPENING
    asked = "Example: <think>bright bone</think><answer>A</answer>\n{question}\nWrite <think>"
    assert renderer_of(base_copy, template, template=asked).render(example).prefill == ""


def test_a_tag_that_is_a_token_of_its_own_is_still_a_tag(base_copy, example):
    tokens = json.loads((base_copy / "tokenizer.json").read_text())
    # the last ids of ordinary words stand for the tags, as in models that were trained to reason
    added = [
        {**tokens["added_tokens"][0], "id": 748 + i, "content": tag, "special": False}
        for i, tag in enumerate(("<think>", "</think>"))
    ]
    tokens["added_tokens"] += added
    (base_copy / "tokenizer.json").write_text(json.dumps(tokens))
    renderer = renderer_of(base_copy, TURNS + opening("<think>\n"))
    assert renderer.render(example).prefill == "<think>\n"
    for token in added:
        token["special"] = True
    (base_copy / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match=r'<think>, </think> as control .*"special": false'):
        renderer_of(base_copy, TURNS + opening("<think>\n"))


def test_a_written_completion_goes_on_from_the_prefill_and_ends_as_a_turn_does(base_copy, example):
    renderer = renderer_of(base_copy, TURNS + opening("<think>\n"))
    prompt = renderer.render(example)
    written = remaining(prompt.prefill, "<think>the liver</think>\n<answer>A</answer>")
    token_ids = renderer.completion_ids(written)
    whole = renderer.tokenizer.decode(np.concatenate([prompt.token_ids, token_ids]))
    assert whole.endswith("<|im_start|>assistant\n<think>\nthe liver</think>\n<answer>A</answer><|im_end|>")
    assert renderer.completion_ids(written + "<|im_end|>").tolist() == token_ids.tolist()


def test_the_end_that_is_learnt_is_the_templates(base_copy):
    config = json.loads((base_copy / "tokenizer_config.json").read_text())
    (base_copy / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    renderer = renderer_of(base_copy, TURNS + OPENING)
    assert renderer.tokenizer.eos_token == "<|endoftext|>"
    assert renderer.tokenizer.convert_ids_to_tokens(int(renderer.completion_ids("B")[-1])) == "<|im_end|>"
    assert renderer.end_tokens == ("<|im_end|>", "<|endoftext|>")
    # turns that no token ends, and a tokenizer that names none
    plain = TURNS.replace("<|im_end|>", "")
    assert renderer_of(base_copy, plain + OPENING).completion_ids("B")[-1] == renderer.tokenizer.eos_token_id
    renderer = renderer_of(base_copy, plain + OPENING)
    renderer.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set eos_token"):
        renderer.completion_ids("B")


def test_a_template_that_takes_lists_only_is_given_one(base_copy):
    template = TURNS.replace("message['content'] is string", "false") + OPENING
    assert "Which?\nA) a" in renderer_of(base_copy, template).render(Example("q", None, "Which?", ("a", "b"), 0)).text


def test_the_template_of_older_processors_is_used_where_there_is_no_other(base_copy, example):
    template = (base_copy / "chat_template.jinja").read_text()
    (base_copy / "chat_template.jinja").unlink()
    (base_copy / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    renderer = PromptRenderer(*open_model(base_copy), max_prompt_tokens=512)
    assert renderer.render(example).text.startswith(SYSTEM)
    (base_copy / "chat_template.json").write_text("[]")
    with pytest.raises(ValueError, match=r"chat_template\.json is damaged"):
        open_model(base_copy)
