"""Write the prompt of training into a chat template, for those who ask without rlmed.

A served model gets the question and its options; what stood around them in training is added here,
around the first user turn of a conversation. It is added once: not to a text that has it already,
and not where the template's variable `training_prompt` is false, as in rlmed's own renderer, which
writes it itself and may be asked for another one. `modality` chooses among several.

The prompt is that of one task. A chat template cannot know the task of a question, so that of a
model of several tasks adds nothing, and users send the whole user turn.

The template of the model follows unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlmed.core.chat import SWITCH
from rlmed.core.process.foreign import foreign
from rlmed.core.types import Example
from rlmed.data.prompts import PromptRenderer
from rlmed.data.templates import QUESTION_SLOT

CHOICE = "choice"
"""The task of rows without a `task`."""
BEGIN, END = "{#- rlmed: the prompt of training -#}", "{#- rlmed: the template of the model -#}\n"
_FILLED = "{%- if not (rlmed_text.startswith(rlmed_around[0]) and rlmed_text.endswith(rlmed_around[1])) -%}"
_STRING = """\
{%- if message['content'] is string -%}
{%- set rlmed_text = message['content'] -%}
IF
{%- set rlmed_text = rlmed_around[0] + rlmed_text + rlmed_around[1] -%}
{%- endif -%}
{%- set rlmed.messages = rlmed.messages + [dict(message, content=rlmed_text)] -%}
{%- else -%}
REST
{%- endif -%}
""".replace("IF", _FILLED)
_LIST = """\
{%- set rlmed.parts = [] -%}
{%- set rlmed.texts = [] -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set rlmed.texts = rlmed.texts + [loop.index0] -%}{%- endif -%}
{%- endfor -%}
{%- set rlmed_text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}
IF
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{%- set before = rlmed_around[0] if loop.index0 == rlmed.texts[0] else '' -%}
{%- set after = rlmed_around[1] if loop.index0 == rlmed.texts[-1] else '' -%}
{%- set rlmed.parts = rlmed.parts + [dict(part, text=before + part['text'] + after)] -%}
{%- else -%}
{%- set rlmed.parts = rlmed.parts + [part] -%}
{%- endif -%}
{%- endfor -%}
{%- else -%}
{%- set rlmed.parts = message['content'] -%}
{%- endif -%}
{%- set rlmed.messages = rlmed.messages + [dict(message, content=rlmed.parts)] -%}
""".replace("IF", _FILLED)
_AS_IT_IS = "{%- set rlmed.messages = rlmed.messages + [message] -%}\n"
_WHOLE = """\
{%- if SWITCH is not defined or SWITCH -%}
{%- set rlmed_around = AROUND.get(modality | default(''), GENERAL) -%}
{%- set rlmed = namespace(messages=[], asked=false) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' and not rlmed.asked -%}
{%- set rlmed.asked = true -%}
TURN
{%- else -%}
{%- set rlmed.messages = rlmed.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = rlmed.messages -%}
{%- endif -%}
""".replace("SWITCH", SWITCH)


def with_training_prompt(renderer: PromptRenderer, task: str | None = CHOICE) -> str:
    """Return the model's chat template with the prompt of training around a question.

    Args:
        renderer: of the checkpoint.
        task: its name; None for several tasks, whose template is the model's own.

    Raises:
        ValueError: if the template does not then write what the renderer writes.
    """
    template = own_template(renderer.tokenizer)
    if task is None:
        return template
    general, by_modality = _prompts(renderer, task)
    # a loop over the parts tells vLLM to send a list, which text models' templates may not take
    parts = renderer.pictures is not None or _takes_lists(renderer.tokenizer, template)
    turn = _STRING.replace("REST\n", _LIST if parts else _AS_IT_IS)
    filled = {
        "SWITCH": SWITCH,
        "AROUND": _literal({name: _around(text) for name, text in by_modality.items()}),
        "GENERAL": _literal(_around(general)),
        "TURN\n": turn,
    }
    # in one pass: a prompt may hold one of these words
    before = re.sub("|".join(filled), lambda found: filled[found[0]], _WHOLE)
    whole = f"{BEGIN}\n{before}{END}{template}"
    _check(renderer, whole, template, {"": general, **by_modality}, parts=parts)
    return whole


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat template without what `with_training_prompt` has put before it."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template["default"]
    assert isinstance(template, str), "prompts were rendered with it"
    return template.partition(END)[2] if template.startswith(BEGIN) and END in template else template


def _prompts(renderer: PromptRenderer, task: str) -> tuple[str, Mapping[str, str]]:
    """Return the template of a task's user turn, and those by modality."""
    if task == CHOICE:
        return renderer.templates.general, renderer.templates.by_modality
    return renderer.templates.of(Example("", None, "", task=task)), {}


def _around(template: str) -> list[str]:
    before, _, after = template.partition(QUESTION_SLOT)
    return [before, after]


def _literal(value: Any) -> str:
    """Return texts as Jinja's literal; it reads JSON's escapes, but for surrogate pairs."""
    return json.dumps(value, ensure_ascii=False)


def _render(tokenizer: PreTrainedTokenizerBase, template: str, content: Any, **variables: Any) -> str:
    messages = [{"role": "user", "content": content}]
    return str(
        tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
        )
    )


def _takes_lists(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether a template writes a list of parts as it writes their text."""
    text = "Which?\nA) liver"
    try:
        with foreign("the chat template", ""):
            listed = _render(tokenizer, template, [{"type": "text", "text": text}])
            return listed == _render(tokenizer, template, text)
    except ValueError:
        return False


def _check(renderer: PromptRenderer, whole: str, template: str, prompts: Mapping[str, str], *, parts: bool) -> None:
    """Check the template on a question: with the prompt, without, and where it is there already."""
    picture = [] if renderer.pictures is None else [{"type": "image"}]
    question = "Which organ is shown?\nA) liver\nB) spleen"

    def content(text: str) -> Any:
        return [*picture, {"type": "text", "text": text}] if parts else text

    for name, prompt in prompts.items():
        variables: dict[str, Any] = {"modality": name} if name else {}
        full = prompt.replace(QUESTION_SLOT, question)
        with foreign(f"the chat template of model {renderer.tokenizer.name_or_path!r}", "Correct it"):
            expected = _render(renderer.tokenizer, template, content(full))
            found = [
                _render(renderer.tokenizer, whole, content(question), **variables),
                _render(renderer.tokenizer, whole, content(full), **variables),
                _render(renderer.tokenizer, whole, content(full), **{SWITCH: False}),
            ]
        if found != [expected] * 3:
            raise ValueError(
                f"the chat template of model {renderer.tokenizer.name_or_path!r} changes what it is given, so the prompt of "
                f"training cannot be written into it (it writes {found[0]!r}, and training had {expected!r}): correct it"
            )
