"""Load a tokenizer and inspect its chat template: where a turn begins and ends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmed.core.files.damage import cause, is_pointer, read_json
from rlmed.core.prefill import TAGS, prefill_of
from rlmed.core.process.foreign import foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"
OLD_TEMPLATE_FILE = "chat_template.json"
"""Where older processors keep the template; tokenizers ignore this file."""
PROCESSOR = "processor_config.json"
"""Where some processors keep the template."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
SWITCH = "training_prompt"
"""Variable of an exported chat template: false keeps it from adding the prompt of training."""
_ASKED, _ANSWERED = "What is shown?", "The liver is shown."
"""Turns of a sample conversation, rendered to inspect the template."""


def has_tokenizer(folder: Path | str) -> bool:
    """Return whether a folder holds a tokenizer; else transformers silently builds an empty one."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub name, with its chat template if it has one.

    Raises:
        ValueError: if its files are missing or damaged.
    """
    from transformers import AutoTokenizer

    if Path(folder).is_dir() and not has_tokenizer(folder):
        raise ValueError(f"model {str(folder)!r} has no tokenizer.json: copy it from the base model")
    for name in (*TOKENIZER_FILES, TEMPLATE_FILE):
        if (Path(folder) / name).is_file() and is_pointer(Path(folder) / name):
            raise ValueError(f"{Path(folder) / name} is damaged: {cause(Path(folder) / name, '')}")
    written = Path(folder) / TEMPLATE_FILE
    if written.is_file():
        with foreign(f"{written} cannot be read", "Save it as UTF-8"):
            written.read_text(encoding="utf-8")
    with foreign(
        f"the tokenizer of model {str(folder)!r} cannot be loaded",
        "Copy tokenizer.json and tokenizer_config.json from the base model",
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not written.is_file():
        _take_processors_template(Path(folder), tokenizer)
    # an editor's byte order mark would begin every prompt
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    return tokenizer


def _take_processors_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Use the processor's template for a vision model's tokenizer, as transformers and vLLM do.

    The template in tokenizer_config.json is often text-only: tools that train language models write
    their own there.

    Raises:
        ValueError: if a file is damaged, or its template is not a string.
    """
    config = folder / "config.json"
    vision = config.is_file() and "vision_config" in read_json(config)
    for name in (OLD_TEMPLATE_FILE, PROCESSOR):
        if not (folder / name).is_file() or not (template := read_json(folder / name).get("chat_template")):
            continue
        if not isinstance(template, str):
            raise ValueError(
                f"chat_template in {folder / name} is a {type(template).__name__}, not a string: write the template to "
                f"{TEMPLATE_FILE}"
            )
        if vision or tokenizer.chat_template is None:
            tokenizer.chat_template = template
            return


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name the chat template and the files that may hold it, for error messages."""
    files = f"{TEMPLATE_FILE}, {OLD_TEMPLATE_FILE} or tokenizer_config.json"
    return f"the chat template of model {tokenizer.name_or_path!r} ({files})"


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool
) -> str:
    """Render messages with the chat template, as they are.

    An exported folder's template would put the prompt of training around the question
    (`rlmed.export.template`): here it is asked not to.

    Raises:
        ValueError: if the template cannot be rendered.
    """
    parts = ", a list of image and text" if isinstance(messages[0]["content"], list) else ""
    variables: dict[str, Any] = {SWITCH: False}
    with foreign(
        f"{template_source(tokenizer)} cannot be rendered",
        f"Correct it, or copy the one of the model that this one was trained from; it receives one user turn{parts}",
    ):
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
        )


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return added tokens, text to id, that a template may mark turns with; no completion tags."""
    added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    return {text: token_id for text, token_id in added.items() if text.strip() and text not in TAGS}


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the token that ends an answer in the chat template, for example `<|im_end|>`.

    None if the template ends answers otherwise or rejects conversations with an answer.
    """
    names = template_tokens(tokenizer)
    for _, text in _conversations(tokenizer):
        _, found, rest = text.rpartition(_ANSWERED)
        header = text.partition(_ASKED)[0]
        opening = max(
            names, key=header.rfind, default=""
        )  # where no token ends a turn, the next one may follow at once
        ends = [name for name in names if rest.lstrip().startswith(name) and (name != opening or name not in header)]
        if found and ends:
            return max(ends, key=len)
    return None


def unopened_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    r"""Return what the chat template puts before an answer but omits from the generation prompt.

    It is "" for a correct template, and `<|im_start|>assistant\n`, for example, for one that
    ignores `add_generation_prompt`: the model would have to open its own turn. Reasoning tags don't
    count (`template_prefill`).
    """
    for prompt, text in _conversations(tokenizer):
        before, found, _ = text.rpartition(_ANSWERED)
        if found and before.startswith(prompt):
            rest = before[len(prompt) :]
            return rest if re.sub("|".join(TAGS), "", rest).strip() else ""
    return ""


def _conversations(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield a prompt without and with its answer in each message form that the template accepts."""
    if tokenizer.chat_template is None:
        return
    for form in (str, lambda text: [{"type": "text", "text": text}]):
        asked, answered = {"role": "user", "content": form(_ASKED)}, {"role": "assistant", "content": form(_ANSWERED)}
        try:
            prompt = render_chat(tokenizer, [asked], add_generation_prompt=True)
            yield prompt, render_chat(tokenizer, [asked, answered], add_generation_prompt=False)
        except ValueError:  # the template accepts a single question only
            continue


def template_prefill(tokenizer: PreTrainedTokenizerBase, text: str, without: str, content: str) -> str:
    """Return the completion's beginning that a rendered prompt holds; see `rlmed.core.prefill`.

    Args:
        tokenizer: owner of the template.
        text: the rendered prompt.
        without: the same prompt without its generation prompt, if the template can omit it.
        content: the user's text; neither it nor anything before it belongs to the completion.
    """
    if text.startswith(without) and len(without) < len(text):
        tail = text[len(without) :]
    else:
        _, found, rest = text.rpartition(content.strip())
        tail = rest if found else ""
    starts = [tail.rfind(name) + len(name) for name in template_tokens(tokenizer) if name in tail]
    return prefill_of(tail[max(starts, default=0) :])
