"""Turn examples into model inputs: the only module that tokenizes.

Training, evaluation and `ask` all render through `PromptRenderer`, so text, white space and pixels
are the same everywhere. The prompt is one user turn: the images in order, then the question, its
lettered options and the instruction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoConfig, PreTrainedTokenizerBase

from rlmed.core.chat import TEMPLATE_FILE, load_tokenizer, render_chat, template_prefill, template_source, turn_end
from rlmed.core.prefill import ANSWER, TAGS, THINK_END
from rlmed.core.process.foreign import foreign
from rlmed.core.types import BoxFrame, Example, IntArray, Prompt
from rlmed.data.images import load_image
from rlmed.data.pictures import Pictures, Prepared, kind_of, load_pictures
from rlmed.data.templates import PAPER_TEMPLATE, Templates, asks_for_reasoning, write_prompt_settings
from rlmed.tasks.registry import task_of

_PROBE = "Which organ is shown?\nA) liver\nB) spleen"


class PromptTooLongError(ValueError):
    """A prompt exceeds its limit even with the smallest images. Prompts are never truncated."""


def load_processor(folder: Path | str) -> tuple[PreTrainedTokenizerBase, Pictures | None]:
    """Load a model's tokenizer and its rules for pictures (None if text-only); folder or hub name.

    Raises:
        ValueError: if the folder lacks a tokenizer, chat template or, for a vision model, image
            processor.
    """
    tokenizer = load_tokenizer(folder)
    with foreign(
        f"model {str(folder)!r} cannot prepare prompts",
        "A model folder needs config.json: copy it from the model that it was trained from",
    ):
        config = AutoConfig.from_pretrained(folder)
    pictures = load_pictures(folder, config, tokenizer) if "vision_config" in config.to_dict() else None
    if tokenizer.chat_template is None:
        raise ValueError(
            f"model {str(folder)!r} has no chat template: add {TEMPLATE_FILE} or use an instruction-tuned model"
        )
    return tokenizer, pictures


class PromptRenderer:
    """Renders examples for one model.

    Example:
        >>> tokenizer, pictures = load_processor("models/Qwen2-VL-2B-Instruct")             # doctest: +SKIP
        >>> renderer = PromptRenderer(tokenizer, pictures, max_prompt_tokens=512)           # doctest: +SKIP
        >>> renderer.render(example).token_ids.shape                                        # doctest: +SKIP
        (177,)
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pictures: Pictures | None,
        *,
        max_prompt_tokens: int,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        template: str = PAPER_TEMPLATE,
        by_modality: Mapping[str, str] = MappingProxyType({}),
        by_task: Mapping[str, str] = MappingProxyType({}),
        max_images: int | None = None,
        box_frame: BoxFrame = "thousandths",
    ) -> None:
        """Bind a tokenizer and a model's rules for pictures.

        Args:
            tokenizer: with a chat template.
            pictures: the rules, or None for a text-only model.
            max_prompt_tokens: longest prompt, visual tokens included.
            min_pixels: smallest image area in pixels; None keeps the model folder's.
            max_pixels: largest image area in pixels; None keeps the model folder's.
            template: text of the user turn of multiple choice, see `PAPER_TEMPLATE`.
            by_modality: templates for individual modalities, by name.
            by_task: templates for other tasks, by name; others have their own.
            max_images: most images of a prompt; None: any number.
            box_frame: units of boxes in prompts and completions.

        Raises:
            ValueError: for a template without exactly one `{question}`, a tokenizer without an
                image placeholder, or boxes in pixels of pictures that a model cuts into tiles.
        """
        self.templates = Templates(template, dict(by_modality), dict(by_task), box_frame)
        self.tokenizer = tokenizer
        self.turn_end = turn_end(tokenizer)
        """Token with which the chat template ends an answer; None if it uses none."""
        self.max_prompt_tokens, self.max_images = max_prompt_tokens, max_images
        self.prefill = ""
        """Start of each completion that the chat template writes; see `Prompt.prefill`."""
        self.pictures: Pictures | None = None
        """Rules for pictures, with this renderer's limits; None for a text-only model."""
        added = tokenizer.added_tokens_decoder.items()
        control = {token.content: token_id for token_id, token in added if token.special}
        self._control_ids = frozenset(control.values())
        if unreadable := [tag for tag in TAGS if tag in control]:
            raise ValueError(
                f"the tokenizer of model {tokenizer.name_or_path!r} marks {', '.join(unreadable)} as control tokens, which "
                'decoding drops: set "special": false for them in tokenizer.json and tokenizer_config.json'
            )
        if pictures is not None:
            if pictures.placeholder not in control:
                raise ValueError(
                    f"the tokenizer of model {tokenizer.name_or_path!r} has no control token {pictures.placeholder}, which "
                    "stands for a picture: copy tokenizer.json from the model that this one was trained from"
                )
            self.pictures = _with_frame(pictures, box_frame).limited(min_pixels, max_pixels)
        if tokenizer.chat_template is not None:  # one that fails to render is not the rows' fault
            text, self.prefill = self._turn(_PROBE, images=int(pictures is not None))
            self._tokenize(text)

    def render(self, example: Example, images: Sequence[Image.Image] | None = None) -> Prompt:
        """Render the prompt of an example.

        With boxes in pixels, the truth of the prompt's example has the size in which its picture is
        shown: judge completions by it, not by `example`.

        Args:
            example: the question.
            images: RGB pictures to show instead of the example's own (a control in evaluation);
                None loads the latter.

        Raises:
            PromptTooLongError: names id, length, limit and what to do.
            ValueError: for images given to a text-only model, more than `max_images`, an unreadable
                image, or control tokens in the text.
        """
        count = len(example.images if images is None else images)
        if count > (self.max_images or count):
            raise ValueError(
                f"example {example.id}: it has {count} images, and data.max_images={self.max_images}: raise it, or leave "
                "images out"
            )
        text, prefill = self._turn(self._content(example, images=count), images=count)
        if images is None:
            images = [load_image(path) for path in example.images]
        if not images:
            return self._checked(Prompt(example, text, self._tokenize(text), prefill=prefill))
        prepared, token_ids = self._with_pictures(example, text, images)
        if self.templates.box_frame == "pixels":
            assert self.pictures is not None
            truth = task_of(example).framed(example.truth, self.pictures.given_size(prepared))
            example = dataclasses.replace(example, truth=truth)
        return self._checked(Prompt(example, text, token_ids, prepared.inputs, prefill), prepared.texts)

    def _with_pictures(self, example: Example, text: str, images: Sequence[Image.Image]) -> tuple[Prepared, IntArray]:
        """Return the pictures, as large as fit or as small as can be, and the prompt's tokens."""
        pictures = self.pictures
        assert pictures is not None
        pieces = text.split(pictures.placeholder)
        if pictures.unmarked and "" in pieces[1:-1]:
            raise ValueError(
                f"example {example.id}: {template_source(self.tokenizer)} writes its {len(images)} images without a token "
                "between them, and the model would take them for one: copy the one of the model that this one was trained from"
            )
        sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
        with foreign(
            f"example {example.id}: the image{'s' if len(images) > 1 else ''} ({sizes} pixels) cannot be prepared",
            "Check the image and preprocessor_config.json",
        ):
            prepared = pictures.prepare(images)
            token_ids = self._expanded(pieces, prepared)
            if len(token_ids) > self.max_prompt_tokens:
                # shrinking images loses detail; cutting the prompt would lose the question
                others = len(token_ids) - sum(len(self._tokenize(one)) for one in prepared.texts)
                for smaller in pictures.smaller(images, prepared, self.max_prompt_tokens - others):
                    prepared, token_ids = smaller, self._expanded(pieces, smaller)
                    if len(token_ids) <= self.max_prompt_tokens:
                        break
        return prepared, token_ids

    def _expanded(self, pieces: Sequence[str], prepared: Prepared) -> IntArray:
        """Tokenize a prompt with the pictures' tokens between its pieces."""
        shown = zip(pieces, (*prepared.texts, ""), strict=True)
        return self._tokenize("".join(piece + picture for piece, picture in shown))

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """Return the tokens that end a completion, for messages."""
        return tuple(dict.fromkeys(token for token in (self.turn_end, self.tokenizer.eos_token) if token))

    def asks_for_reasoning(self, example: Example) -> bool:
        """Return whether an example's template asks for reasoning before the answer."""
        return asks_for_reasoning(self.templates.of(example))

    def prefill_doubt(self) -> str | None:
        """Return a warning if the chat template leaves no room for the reasoning asked for."""
        asked = any(map(asks_for_reasoning, self.templates.given))
        if not (THINK_END in self.prefill or ANSWER in self.prefill) or not asked:
            return None
        return (
            f"{template_source(self.tokenizer)} has written {self.prefill!r} before the model writes anything, and the prompt "
            "asks for a reasoning: take that out of its generation prompt, or ask for answers alone (prompt=answer_only)"
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode sampled ids, without control tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def completion_ids(self, text: str) -> IntArray:
        """Tokenize a written completion as if the model sampled it, end token included; int64 [T].

        The end token is the chat template's, as in a conversation, else the tokenizer's; sampling
        stops at both.

        Raises:
            ValueError: if neither names one.
        """
        end = self.turn_end or self.tokenizer.eos_token
        if end is None:
            raise ValueError(
                f"model {self.tokenizer.name_or_path!r} names no end of a completion: set eos_token in tokenizer_config.json"
            )
        end_ids = np.asarray(self.tokenizer.convert_tokens_to_ids([end]), dtype=np.int64)
        return np.append(self.continuation_ids(text.removesuffix(end)), end_ids)

    def continuation_ids(self, text: str) -> IntArray:
        """Tokenize the beginning of a completion, without an end token; int64 [T].

        A model can spell out the name of a control token. It stays text here, as it was for the
        model: an extra image placeholder would have no image.
        """
        token_ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        return np.asarray(token_ids, dtype=np.int64)

    def split_common_prefix(self, texts: Sequence[str]) -> tuple[IntArray, list[IntArray]]:
        """Tokenize texts into shared prefix and the rest of each, which has at least one token.

        Splits between tokens, not characters: Qwen2's tokenizer may merge the last shared character
        with the first differing one.

        Raises:
            ValueError: if one text's tokens are a prefix of another's.
        """
        token_ids = [self.continuation_ids(text).tolist() for text in texts]
        # of several lists, the smallest and the largest share the shortest prefix
        first, last = min(token_ids), max(token_ids)
        shared = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
        if any(len(ids) == shared for ids in token_ids):
            raise ValueError(f"the texts {', '.join(map(repr, texts))} cannot be told apart by what follows")
        return np.array(first[:shared], dtype=np.int64), [np.array(ids[shared:], dtype=np.int64) for ids in token_ids]

    def save(self, folder: Path) -> None:
        """Save tokenizer and image processor beside a model, so that the folder loads everywhere.

        Also saves this renderer's pixel limits, so that pictures keep their size for whatever loads
        the folder, and its templates and longest prompt (`read_prompt_settings`).
        """
        write_prompt_settings(folder, self.templates, self.max_prompt_tokens)
        self.tokenizer.save_pretrained(folder)
        if self.pictures is not None:
            self.pictures.save(folder)

    def _content(self, example: Example, *, images: int) -> str:
        """Return the text of the user turn."""
        if images and self.pictures is None:
            shown = "an image" if images == 1 else f"{images} images"
            raise ValueError(f"example {example.id}: it has {shown}, but the model reads text only")
        question = task_of(example).question_text(example)
        found = self._control_ids.intersection(
            self.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
        )
        if found:
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(found)))
            raise ValueError(
                f"example {example.id}: its question or options contain the control token {names}, which would be "
                "taken for a turn or an image: remove it from the text"
            )
        return self.templates.content(example)

    def _turn(self, content: str, *, images: int) -> tuple[str, str]:
        """Return the chat template's user turn, and the start of the completion that it adds.

        Raises:
            ValueError: if the template fails to render, or drops the text or an image.
        """
        text_part = {"type": "text", "text": content}
        # some templates accept only a list
        forms: list[Any] = [[{"type": "image"}] * images + [text_part]] if images else [content, [text_part]]
        errors: list[ValueError] = []
        for form in forms:
            messages = [{"role": "user", "content": form}]
            try:
                text = render_chat(self.tokenizer, messages, add_generation_prompt=True)
                without = render_chat(self.tokenizer, messages, add_generation_prompt=False)
            except ValueError as error:
                errors.append(error)
                continue
            if " ".join(content.split()) in " ".join(text.split()):
                self._check_placeholders(text, images)
                return text, template_prefill(self.tokenizer, text, without, content)
        if errors:
            raise errors[0]
        raise ValueError(
            f"{template_source(self.tokenizer)} does not write the question as it is given: correct it, or copy the one of the "
            "model that this one was trained from"
        )

    def _check_placeholders(self, text: str, needed: int) -> None:
        if self.pictures is None:
            return
        placeholder = self.pictures.placeholder
        found = text.count(placeholder)
        if found != needed:
            raise ValueError(
                f"{template_source(self.tokenizer)} writes {found} image placeholders ({placeholder}) where {needed} belong: "
                "copy the one of the model that this one was trained from"
            )

    def _tokenize(self, text: str) -> IntArray:
        # the chat template has added every special token; we enforce the length ourselves
        with foreign(
            f"the tokenizer of model {self.tokenizer.name_or_path!r} cannot be used",
            "Copy tokenizer.json and tokenizer_config.json again",
        ):
            token_ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(token_ids, dtype=np.int64)

    def _checked(self, prompt: Prompt, pictures: Sequence[str] = ()) -> Prompt:
        """Return a prompt within its limit; `pictures` are the texts of its images."""
        length = len(prompt.token_ids)
        if length > self.max_prompt_tokens and len(pictures) > 1:
            each = [len(self._tokenize(text)) for text in pictures]
            least = f"{min(each)}" if min(each) == max(each) else f"{min(each)} to {max(each)}"
            raise PromptTooLongError(
                f"example {prompt.example.id}: its prompt has {length} tokens, {sum(each)} of them for {len(each)} images, "
                f"which have at least {least} each, and the limit is {self.max_prompt_tokens}: raise data.max_prompt_tokens or "
                "leave images out"
            )
        if length > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"example {prompt.example.id}: its prompt has {length} tokens, even with the smallest image, and the "
                f"limit is {self.max_prompt_tokens}: raise data.max_prompt_tokens or shorten the question"
            )
        return prompt


def _with_frame(pictures: Pictures, box_frame: BoxFrame) -> Pictures:
    """Return the pictures, in whose units boxes can be; raise ValueError if they cannot."""
    if box_frame == "pixels" and pictures.limits is None:
        raise ValueError(
            f"data.box_frame=pixels: the model's {kind_of(pictures.image_processor)} gives it no whole picture of one size, "
            "but tiles or a square: set data.box_frame=thousandths"
        )
    return pictures
