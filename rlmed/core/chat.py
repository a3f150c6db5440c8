"""A tokenizer and its chat template: how a turn begins and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmed.core.damage import cause, is_pointer, read_json
from rlmed.core.foreign import foreign
from rlmed.core.prefill import TAGS, prefill_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"
OLD_TEMPLATE_FILE = "chat_template.json"
"""Where older processors keep it; tokenizers don't look there."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_ASKED, _ANSWERED = "What is shown?", "The liver is shown."
"""Turns of a conversation that shows what the template makes of it."""


def has_tokenizer(folder: Path | str) -> bool:
    """True where a folder holds a tokenizer; transformers would make an empty one without a word."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name, with its chat template where there is one.

    Raises:
        ValueError: when its files are missing or damaged.
    """
    from transformers import AutoTokenizer

    if Path(folder).is_dir() and not has_tokenizer(folder):
        raise ValueError(
            f"model {str(folder)!r} has no tokenizer.json: copy it from the model that it was trained from"
        )
    for name in TOKENIZER_FILES:
        if (Path(folder) / name).is_file() and is_pointer(Path(folder) / name):
            raise ValueError(f"{Path(folder) / name} is damaged: {cause(Path(folder) / name, '')}")
    with foreign(
        f"the tokenizer of model {str(folder)!r} cannot be loaded",
        "Copy tokenizer.json and tokenizer_config.json from the model that it was trained from",
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    old = Path(folder) / OLD_TEMPLATE_FILE
    if tokenizer.chat_template is None and old.is_file():
        tokenizer.chat_template = read_json(old).get("chat_template")
    return tokenizer


def template_place(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where a chat template is, for messages."""
    return f"the chat template of model {tokenizer.name_or_path!r} ({TEMPLATE_FILE} or tokenizer_config.json)"


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool
) -> str:
    """Turns as the chat template writes them.

    Raises:
        ValueError: when the template cannot be rendered.
    """
    with foreign(
        f"{template_place(tokenizer)} cannot be rendered",
        "Correct it, or copy the one of the model that this one was trained from; it is given one user turn",
    ):
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Id by text of the tokens that a template may mark turns with: all that were added, but not the tags of a completion."""
    added = {token.content: place for place, token in tokenizer.added_tokens_decoder.items()}
    return {text: place for text, place in added.items() if text.strip() and text not in TAGS}


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token by which the chat template ends an answer, for example `<|im_end|>`.

    None where it ends it otherwise, or takes no conversation that holds an answer.
    """
    if tokenizer.chat_template is None:
        return None
    names = template_tokens(tokenizer)
    forms: tuple[Any, ...] = (_ANSWERED, [{"type": "text", "text": _ANSWERED}])
    for content in forms:
        turns = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": content}]
        try:
            text = render_chat(tokenizer, turns, add_generation_prompt=False)
        except ValueError:  # of a template for a single question
            continue
        _, found, rest = text.rpartition(_ANSWERED)
        header = text.partition(_ASKED)[0]
        opening = max(
            names, key=header.rfind, default=""
        )  # where no token ends a turn, the next one may follow at once
        ends = [name for name in names if rest.lstrip().startswith(name) and (name != opening or name not in header)]
        if found and ends:
            return max(ends, key=len)
    return None


def template_prefill(tokenizer: PreTrainedTokenizerBase, text: str, without: str, content: str) -> str:
    """What a rendered prompt already holds of the completion, see `rlmed.core.prefill`.

    Args:
        tokenizer: of the template.
        text: the prompt.
        without: the same without its generation prompt, as far as the template can leave it out.
        content: the user's text. What stands in it, or before it, is no part of the completion.
    """
    if text.startswith(without) and len(without) < len(text):
        tail = text[len(without) :]
    else:
        _, found, rest = text.rpartition(content.strip())
        tail = rest if found else ""
    starts = [tail.rfind(name) + len(name) for name in template_tokens(tokenizer) if name in tail]
    return prefill_of(tail[max(starts, default=0) :])
