"""A completion ends with any token its folder's files call its end, in each engine and learning."""

from __future__ import annotations

import json

import pytest

from rlmed.cluster.engines import open_model
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.models.folder.end_tokens import find_end_tokens
from rlmed.models.policy import load_config, load_policy

PAD, END, OTHER = 734, 736, 738
"""<|endoftext|>, <|im_end|> and <|object_ref_end|> of the embedded model."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}END\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("generation", "tokenizer", "tokens_map", "turn", "ends", "said"),
    [
        # generation_config, tokenizer_config, special_tokens_map, template: what ends a completion,
        # and whether that is said
        ([END, PAD], "<|im_end|>", None, "<|im_end|>", {PAD, END}, False),
        (PAD, "<|im_end|>", None, "<|im_end|>", {PAD, END}, True),
        (END, "<|endoftext|>", None, "<|im_end|>", {PAD, END}, True),
        (PAD, "<|endoftext|>", None, "<|im_end|>", {PAD, END}, True),
        (PAD, "<|endoftext|>", None, "", {PAD}, False),
        (END, "<|im_end|>", "<|endoftext|>", "<|im_end|>", {PAD, END}, True),
        (END, "<|im_end|>", {"content": "<|object_ref_end|>", "lstrip": False}, "<|im_end|>", {END, OTHER}, True),
        (None, "<|im_end|>", None, "<|im_end|>", {END}, True),
        (None, None, None, "<|object_ref_end|>", {OTHER}, True),
        ([], {"__type": "AddedToken", "content": "<|im_end|>"}, None, "", {END}, True),
    ],
)
def test_the_union_ends_a_completion(base_copy, caplog, generation, tokenizer, tokens_map, turn, ends, said):
    for name, value in (
        ("generation_config.json", {"eos_token_id": generation}),
        ("tokenizer_config.json", {"eos_token": tokenizer}),
    ):
        content = json.loads((base_copy / name).read_text()) | value
        (base_copy / name).write_text(json.dumps({key: entry for key, entry in content.items() if entry is not None}))
    if tokens_map:
        (base_copy / "special_tokens_map.json").write_text(json.dumps({"eos_token": tokens_map}))
    (base_copy / "chat_template.jinja").write_text(TEMPLATE.replace("END", turn))
    open_model(base_copy)
    assert ("has conflicting end tokens" in caplog.text) is said
    if said:
        assert "generation_config.json: " in caplog.text
        assert all(str(end) in caplog.text for end in ends)
    policy = load_policy(base_copy)
    assert policy.end_token_ids == ends
    # what vLLM is given to stop at
    assert set(find_end_tokens(base_copy, load_config(base_copy)).ids) == ends
    # what supervised fine-tuning teaches is one of them
    renderer = PromptRenderer(*load_processor(base_copy), max_prompt_tokens=512)
    if turn or tokenizer:
        assert int(renderer.completion_ids("B")[-1]) in ends


def test_a_checkpoint_agrees_with_itself(base_copy, tmp_path, caplog):
    (base_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": PAD, "pad_token_id": PAD}))
    load_policy(base_copy).model.save_pretrained(tmp_path / "checkpoint")
    PromptRenderer(*open_model(base_copy), max_prompt_tokens=512).save(tmp_path / "checkpoint")
    assert "has conflicting end tokens" in caplog.text
    caplog.clear()
    open_model(tmp_path / "checkpoint")
    assert caplog.text == ""
    assert json.loads((tmp_path / "checkpoint" / "generation_config.json").read_text())["eos_token_id"] == [PAD, END]
    assert load_policy(tmp_path / "checkpoint").end_token_ids == {PAD, END}


def test_a_folder_that_names_no_end_is_refused(base_copy):
    (base_copy / "generation_config.json").write_text("{}")
    config = json.loads((base_copy / "tokenizer_config.json").read_text())
    (base_copy / "tokenizer_config.json").write_text(
        json.dumps({key: config[key] for key in config if key != "eos_token"})
    )
    (base_copy / "chat_template.jinja").write_text(TEMPLATE.replace("END", ""))
    with pytest.raises(ValueError, match=r"generation_config\.json .*eos_token_id .*tokenizer .*eos_token"):
        load_policy(base_copy)


def test_an_end_token_that_the_model_has_no_place_for_is_refused(base_copy):
    config = json.loads((base_copy / "tokenizer_config.json").read_text())
    (base_copy / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|never_seen|>"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: .*\b748\b.*\(0 to 747\)"):
        load_policy(base_copy)


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ("<|im_end|>", {PAD, END}),
        ("{{ '\n' }}<|im_end|>", {PAD, END}),
        # a token that opens turns does not end them
        ("{{ '\n' }}<|im_start|>", {PAD}),
        # text, even if a token is named further on
        (" The end.<|im_end|>", {PAD}),
        # a template for one question is no reason to stop
        ("{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}", {PAD}),
    ],
)
def test_the_end_of_a_turn_is_the_token_after_an_answer(base_copy, turn, expected):
    (base_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": PAD}))
    config = json.loads((base_copy / "tokenizer_config.json").read_text())
    (base_copy / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    (base_copy / "chat_template.jinja").write_text(TEMPLATE.replace("END", turn))
    assert load_policy(base_copy).end_token_ids == expected
