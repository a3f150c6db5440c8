"""Turn examples into model inputs: the only module that tokenizes.

Training, evaluation and `ask` all render through `PromptRenderer`, so text, white space and pixels
are the same everywhere. The prompt is one user turn: the image, then the question, its lettered
options and the instruction.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, PreTrainedTokenizerBase

from rlmed.core.chat import TEMPLATE_FILE, load_tokenizer, render_chat, template_prefill, template_source, turn_end
from rlmed.core.prefill import ANSWER, TAGS, THINK, THINK_END
from rlmed.core.process.foreign import foreign
from rlmed.core.types import Example, IntArray, Prompt
from rlmed.data.images import load_image

if TYPE_CHECKING:
    from transformers import Qwen2VLImageProcessorPil

PROMPT_SUFFIX = (
    "Your task: 1. Think through the question step by step, enclose your reasoning process in <think>...</think> tags. "
    "2. Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags. "
    "3. No extra information or text outside of these tags."
)
"""The instruction of MedVLM-R1 (arXiv 2502.19634)."""

QUESTION_SLOT = "{question}"
_IMAGE = "<|image_pad|>"
_PROCESSOR = "Qwen2VLImageProcessor"
_PROBE = "Which organ is shown?\nA) liver\nB) spleen"
PAPER_TEMPLATE = f"{QUESTION_SLOT}\n{PROMPT_SUFFIX}"
"""A template is the text of the user turn with one `{question}`, the only placeholder."""
PROMPT_FILE = "rlmed_prompt.json"
"""In a model folder: the prompt settings of its training."""


class PromptTooLongError(ValueError):
    """A prompt exceeds its limit even with the smallest image. Prompts are never truncated."""


def load_processor(folder: Path | str) -> tuple[PreTrainedTokenizerBase, Qwen2VLImageProcessorPil | None]:
    """Load a model's tokenizer and image processor (None if text-only) from a folder or hub name.

    Always uses the PIL-based image processor: the torchvision one resizes to slightly different
    pixels.

    Raises:
        ValueError: if the folder lacks a tokenizer, chat template or, for a vision model, image
            processor.
    """
    tokenizer = load_tokenizer(folder)
    with foreign(
        f"model {str(folder)!r} cannot prepare prompts",
        "A model folder needs config.json and, for a vision model, preprocessor_config.json: copy them from the model that it "
        "was trained from",
    ):
        vision = "vision_config" in AutoConfig.from_pretrained(folder).to_dict()
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil") if vision else None
    if image_processor is not None:
        size = dict(image_processor.size)
        edges = [size.get(edge) for edge in ("shortest_edge", "longest_edge")]
        if not type(image_processor).__name__.startswith(_PROCESSOR) or not all(
            isinstance(edge, int) for edge in edges
        ):
            raise ValueError(
                f"{Path(folder) / 'preprocessor_config.json'} is of a {type(image_processor).__name__} with size {size}, "
                f"not of a {_PROCESSOR} with pixel limits: copy it from the model that this one was trained from"
            )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"model {str(folder)!r} has no chat template: add {TEMPLATE_FILE} or use an instruction-tuned model"
        )
    return tokenizer, image_processor


def read_prompt_settings(folder: Path | str) -> dict[str, Any] | None:
    """Read a model's training prompt settings as `PromptRenderer` keywords; None if it has none.

    They are `template`, `by_modality` and, if recorded, `max_prompt_tokens`, to which large
    pictures shrink.

    Raises:
        ValueError: if the file is broken.
    """
    path = Path(folder) / PROMPT_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        template, by_modality = content["template"], dict(content["by_modality"])
        limit = {key: int(content[key]) for key in ("max_prompt_tokens",) if key in content}
        for text in (template, *by_modality.values()):
            if not isinstance(text, str):
                raise TypeError(f"{text!r} is not a text")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold a template and by_modality, or a wrong max_prompt_tokens ({error}): remove it to ask as "
            "MedVLM-R1 does"
        ) from error
    return {"template": template, "by_modality": by_modality, **limit}


class PromptRenderer:
    """Renders examples for one model.

    Example:
        >>> tokenizer, image_processor = load_processor("models/Qwen2-VL-2B-Instruct")      # doctest: +SKIP
        >>> renderer = PromptRenderer(tokenizer, image_processor, max_prompt_tokens=512)    # doctest: +SKIP
        >>> renderer.render(example).token_ids.shape                                        # doctest: +SKIP
        (177,)
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil | None,
        *,
        max_prompt_tokens: int,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        template: str = PAPER_TEMPLATE,
        by_modality: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Bind a tokenizer and an image processor.

        Args:
            tokenizer: with a chat template.
            image_processor: of the Qwen2-VL kind, or None for a text-only model.
            max_prompt_tokens: longest prompt, visual tokens included.
            min_pixels: smallest image area in pixels; None keeps the model folder's.
            max_pixels: largest image area in pixels; None keeps the model folder's.
            template: text of the user turn, see `PAPER_TEMPLATE`.
            by_modality: templates for individual modalities, by name.

        Raises:
            ValueError: for a template without exactly one `{question}`, or a tokenizer without an
                image placeholder.
        """
        for text in (template, *by_modality.values()):
            if text.count(QUESTION_SLOT) != 1:
                raise ValueError(f"template {text!r} must contain {QUESTION_SLOT} exactly once")
        self.tokenizer = tokenizer
        self.turn_end = turn_end(tokenizer)
        """Token with which the chat template ends an answer; None if it uses none."""
        self.max_prompt_tokens = max_prompt_tokens
        self.template, self.by_modality = template, dict(by_modality)
        self.prefill = ""
        """Start of each completion that the chat template writes; see `Prompt.prefill`."""
        self._image_processor = image_processor
        added = tokenizer.added_tokens_decoder.items()
        control = {token.content: token_id for token_id, token in added if token.special}
        self._control_ids = frozenset(control.values())
        if unreadable := [tag for tag in TAGS if tag in control]:
            raise ValueError(
                f"the tokenizer of model {tokenizer.name_or_path!r} marks {', '.join(unreadable)} as control tokens, which "
                'decoding drops: set "special": false for them in tokenizer.json and tokenizer_config.json'
            )
        if image_processor is not None:
            if _IMAGE not in control:
                raise ValueError(f"the tokenizer has no {_IMAGE} token: it is not one of a Qwen2-VL family model")
            self._image_token_id = control[_IMAGE]
            size = image_processor.size
            self._min_pixels = size["shortest_edge"] if min_pixels is None else min_pixels
            self._max_pixels = size["longest_edge"] if max_pixels is None else max_pixels
            if not 0 < self._min_pixels <= self._max_pixels:
                limits = f"min_pixels={self._min_pixels} and max_pixels={self._max_pixels}"
                raise ValueError(f"{limits}: pixel limits must satisfy 0 < min_pixels <= max_pixels")
        # a template that fails to render is not the rows' fault
        if tokenizer.chat_template is not None:
            text, self.prefill = self._turn(_PROBE, with_image=image_processor is not None)
            self._tokenize(text)

    def render(self, example: Example, image: Image.Image | None = None) -> Prompt:
        """Render the prompt of an example.

        Args:
            example: the question.
            image: RGB picture to show instead of the example's own (a control in evaluation); None
                loads the latter.

        Raises:
            PromptTooLongError: names id, length, limit and what to do.
            ValueError: for an image given to a text-only model, an unreadable image, or control
                tokens in the text.
        """
        if image is None and example.image is not None:
            image = load_image(example.image)
        text, prefill = self._turn(self._content(example, with_image=image is not None), with_image=image is not None)
        token_ids = self._tokenize(text)
        if image is None:
            return self._checked(Prompt(example, text, token_ids, prefill=prefill))
        (slots,) = np.nonzero(token_ids == self._image_token_id)
        pixel_values, grid = self._pixels(example, image, self._max_pixels)
        room = self.max_prompt_tokens - (len(token_ids) - 1)
        if self._visual_tokens(grid) > room:
            # shrinking the image loses detail; cutting the prompt would lose the question
            assert self._image_processor is not None
            side = self._image_processor.patch_size * self._image_processor.merge_size
            pixel_values, grid = self._pixels(example, image, max(self._min_pixels, room * side**2))
        expanded = np.concatenate(
            [
                token_ids[: slots[0]],
                np.full(self._visual_tokens(grid), self._image_token_id, dtype=np.int64),
                token_ids[slots[0] + 1 :],
            ]
        )
        images = {"pixel_values": pixel_values, "image_grid_thw": grid}
        return self._checked(Prompt(example, text, expanded, images, prefill))

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """Return the tokens that end a completion, for messages."""
        return tuple(dict.fromkeys(token for token in (self.turn_end, self.tokenizer.eos_token) if token))

    def asks_for_reasoning(self, example: Example) -> bool:
        """Return whether an example's template asks for reasoning before the answer."""
        return _asks_for_reasoning(self._template_of(example))

    def prefill_doubt(self) -> str | None:
        """Return a warning if the chat template leaves no room for the reasoning asked for."""
        templates = (self.template, *self.by_modality.values())
        if not (THINK_END in self.prefill or ANSWER in self.prefill) or not any(map(_asks_for_reasoning, templates)):
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
        settings = {
            "template": self.template,
            "by_modality": self.by_modality,
            "max_prompt_tokens": self.max_prompt_tokens,
        }
        (folder / PROMPT_FILE).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(folder)
        if self._image_processor is not None:
            processor = copy.deepcopy(self._image_processor)
            processor.size = {"shortest_edge": self._min_pixels, "longest_edge": self._max_pixels}
            processor.save_pretrained(folder)

    def _template_of(self, example: Example) -> str:
        return self.by_modality.get(example.modality, self.template)

    def _content(self, example: Example, *, with_image: bool) -> str:
        """Return the text of the user turn."""
        if with_image and self._image_processor is None:
            raise ValueError(f"example {example.id}: it has an image, but the model reads text only")
        question = example.question_text
        found = self._control_ids.intersection(
            self.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
        )
        if found:
            names = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(found)))
            raise ValueError(
                f"example {example.id}: its question or options contain the control token {names}, which would be "
                "taken for a turn or an image: remove it from the text"
            )
        return self._template_of(example).replace(QUESTION_SLOT, question)

    def _turn(self, content: str, *, with_image: bool) -> tuple[str, str]:
        """Return the chat template's user turn, and the start of the completion that it adds.

        Raises:
            ValueError: if the template fails to render, or drops the text or the image.
        """
        text_part = {"type": "text", "text": content}
        # some templates accept only a list
        forms: list[Any] = [[{"type": "image"}, text_part]] if with_image else [content, [text_part]]
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
                self._check_placeholders(text, content, with_image=with_image)
                return text, template_prefill(self.tokenizer, text, without, content)
        if errors:
            raise errors[0]
        raise ValueError(
            f"{template_source(self.tokenizer)} does not write the question as it is given: correct it, or copy the one of the "
            "model that this one was trained from"
        )

    def _check_placeholders(self, text: str, content: str, *, with_image: bool) -> None:
        if self._image_processor is None:
            return
        found, needed = text.count(_IMAGE) - content.count(_IMAGE), int(with_image)
        if found != needed:
            raise ValueError(
                f"{template_source(self.tokenizer)} writes {found} image placeholders ({_IMAGE}) where {needed} belong: copy "
                "the one of the model that this one was trained from"
            )

    def _tokenize(self, text: str) -> IntArray:
        # the chat template has added every special token; we enforce the length ourselves
        with foreign(
            f"the tokenizer of model {self.tokenizer.name_or_path!r} cannot be used",
            "Copy tokenizer.json and tokenizer_config.json again",
        ):
            token_ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(token_ids, dtype=np.int64)

    def _pixels(self, example: Example, image: Image.Image, max_pixels: int) -> tuple[np.ndarray, IntArray]:
        """Return pixel values, float32 [patches, patch width], and the grid, int64 [1, 3]."""
        assert self._image_processor is not None
        size = {"shortest_edge": self._min_pixels, "longest_edge": max_pixels}
        with foreign(
            f"example {example.id}: the image {image.size} cannot be prepared",
            "Check the image and preprocessor_config.json",
        ):
            features = self._image_processor(images=[image], size=size, return_tensors="np")
        return features["pixel_values"].astype(np.float32), features["image_grid_thw"].astype(np.int64)

    def _visual_tokens(self, grid: IntArray) -> int:
        assert self._image_processor is not None
        return int(grid.prod()) // self._image_processor.merge_size**2

    def _checked(self, prompt: Prompt) -> Prompt:
        length = len(prompt.token_ids)
        if length > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"example {prompt.example.id}: its prompt has {length} tokens, even with the smallest image, and the "
                f"limit is {self.max_prompt_tokens}: raise data.max_prompt_tokens or shorten the question"
            )
        return prompt


def _asks_for_reasoning(template: str) -> bool:
    return THINK in template or ANSWER not in template
