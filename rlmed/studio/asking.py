"""Ask one model at a time, one question after another, in a thread; answers are sent as they grow.

torch and the model are loaded for the first question. The events of an answer are JSON objects:
`state` (what is done now), `note`, `text` of a `side` ("image" or "blank") with how many characters
of what was sent before to `keep`, `answer`, `options`, at last `done` or `error`.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from rlmed.core.parsing import answer_text, reasoning_text
from rlmed.core.prefill import ANSWER
from rlmed.core.process.display import lacks_memory, one_line
from rlmed.core.process.starting import loading_libraries
from rlmed.core.types import LETTERS, Completion, Example, Prompt, SamplingParams
from rlmed.data.asking import answer_explained, answer_in_words, asked_example, check_modality, check_pictured
from rlmed.data.images import MAX_IMAGES, check_image, load_image
from rlmed.models.tiny.toy import toy_note
from rlmed.studio.uploads import Uploads
from rlmed.studio.volumes import View
from rlmed.tasks.metrics.boxes import parse_boxes
from rlmed.tasks.metrics.coco import MOST_BOXES

if TYPE_CHECKING:
    from rlmed.cluster.asking import AskedModel

log = logging.getLogger(__name__)

Event = Mapping[str, Any]
Emit = Callable[[Event], None]
TOKEN_BUDGET = 16384
"""Most tokens in a packed row for scoring letters, as the default of `learner.token_budget`."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a person asks.

    Example:
        Question(model="embedded:tiny_base", question="Which organ?", options=("liver", "lung"),
                 views=(("3f…", View("axial", 17)),))
    """

    model: str
    question: str
    views: tuple[tuple[str, View], ...] = ()
    """Ids of sources with what to show of each, in the order in which the model sees them."""
    options: tuple[str, ...] = ()
    task: str = "choice"
    modality: str = ""
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 512
    blank: bool = True
    """Whether to ask over grey pictures too."""


class StoppedError(Exception):
    """The person has gone, or does not want the answer any more."""


@dataclass
class _Side:
    """The picture's or the blank picture's part of an answer, as it grows."""

    name: str
    emit: Emit
    stopped: threading.Event
    _sent: str = ""

    def tell(self, text: str) -> None:
        """Send what is new in a text; raises StoppedError if nobody listens."""
        if self.stopped.is_set():
            raise StoppedError
        if text != self._sent:
            same = (at for at, (old, new) in enumerate(zip(self._sent, text, strict=False)) if old != new)
            keep = next(same, min(len(self._sent), len(text)))
            # the page counts as JavaScript does
            self.emit({"side": self.name, "keep": len(text[:keep].encode("utf-16-le")) // 2, "text": text[keep:]})
            self._sent = text


@dataclass
class Asker:
    """Answers questions, one after another."""

    uploads: Uploads
    _executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="ask"))
    _loaded: AskedModel | None = None
    _running: set[threading.Event] = field(default_factory=set)

    def close(self) -> None:
        """Stop all answers."""
        for stopped in list(self._running):
            stopped.set()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def answer(self, question: Question) -> AsyncGenerator[Event]:
        """Yield the events of an answer; closing the iterator stops it."""
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            if not stopped.is_set():
                loop.call_soon_threadsafe(events.put_nowait, event)

        if ahead := len(self._running):
            emit({"state": f"waiting for {ahead} earlier question{'s' * (ahead > 1)}"})
        self._running.add(stopped)
        future = self._executor.submit(self._work, question, emit, stopped)
        try:
            while True:
                event = await events.get()
                yield event
                if "done" in event or "error" in event:
                    return
        finally:
            stopped.set()
            self._running.discard(stopped)
            future.cancel()

    def _work(self, question: Question, emit: Emit, stopped: threading.Event) -> None:
        """Answer, and turn errors into a line."""
        try:
            with tempfile.TemporaryDirectory(dir=self.uploads.folder) as folder:
                self._answer(question, Path(folder), emit, stopped)
            emit({"done": True})
        except StoppedError:
            return
        except Exception as error:  # nobody but the page would see it
            if not isinstance(error, ValueError | OSError) and not lacks_memory(error):
                log.exception("a question could not be answered")
            emit({"error": one_line(error)})

    def _answer(self, question: Question, folder: Path, emit: Emit, stopped: threading.Event) -> None:
        sampling = SamplingParams(question.temperature, max_tokens=question.max_tokens, seed=question.seed)
        example = self._example(question, folder)
        model = self._model(question.model, emit)
        if doubt := check_modality(example.modality, model.renderer.templates.by_modality, model=question.model):
            emit({"note": doubt})
        if model.renderer.pictures:
            check_pictured(example)
            if not example.images:
                emit({"note": "Asked without an image: what the answer says of one is not seen."})
        if toy := toy_note(model.folder):
            emit({"note": toy})
        for side in ("image", "blank") if question.blank and example.images else ("image",):
            if stopped.is_set():
                raise StoppedError
            emit({"state": "answering" if side == "image" else "answering over a blank image", "side": side})
            prompt = model.render(example, _blank(example) if side == "blank" else None)
            if side == "image" and (passed := model.doubt(prompt, sampling.max_tokens)):
                emit({"note": passed})
            text = _sample(model, prompt, sampling, _Side(side, emit, stopped))
            if prompt.example.is_choice:
                emit({"side": side, "options": _probabilities(model, prompt, text)})

    def _example(self, question: Question, folder: Path) -> Example:
        """Return the question with its pictures as files, those to be rendered in a folder."""
        if len(question.views) > MAX_IMAGES:
            raise ValueError(f"{len(question.views)} images are more than {MAX_IMAGES}: choose among them")
        images = []
        for number, (name, view) in enumerate(question.views, 1):
            source = self.uploads.source(name)
            path = source.file(view)
            if path is None:
                path = folder / f"{number}.png"
                source.picture(view).save(path)
            check_image(path)
            images.append(path)
        return asked_example(
            images, question.question, question.options, task=question.task, modality=question.modality
        )

    def _model(self, path: str, emit: Emit) -> AskedModel:
        """Return the loaded model, or load another one in its place."""
        if self._loaded is None or self._loaded.path != path:
            emit({"state": f"loading {path}"})
            self._loaded = None  # so that two are never in memory
            with loading_libraries():
                from rlmed.cluster.asking import AskedModel
            model = AskedModel(path)
            assert model.policy is not None  # loads it
            self._loaded = model
        return self._loaded


def _blank(example: Example) -> Sequence[Image.Image]:
    """Return grey pictures of the sizes of an example's own."""
    from rlmed.evaluation.controls import GREY

    return [Image.new("RGB", load_image(path).size, GREY) for path in example.images]


def _sample(model: AskedModel, prompt: Prompt, sampling: SamplingParams, side: _Side) -> str:
    """Send a completion as it is sampled, then what it answers; return it."""
    with closing(model.sample(prompt, sampling)) as growing:
        for text, completion in growing:
            # a character may take several tokens
            side.tell(text if completion else text.rstrip("\ufffd"))
            if completion is not None:
                side.emit({"side": side.name, "answer": _said(prompt.example, completion)})
                return text
    raise AssertionError("the engine gave no completion")


def _said(example: Example, completion: Completion) -> dict[str, Any]:
    text, answer = completion.text, answer_text(completion.text)
    boxes = parse_boxes(answer, example.truth["frame"]) if answer and example.task == "grounding" else None
    return {
        "reasoning": reasoning_text(text),
        "words": answer_in_words(example, text),
        "explained": answer_explained(example, text),
        "boxes": [list(box) for box in (boxes or [])[:MOST_BOXES]],
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }


def _probabilities(model: AskedModel, prompt: Prompt, text: str) -> list[dict[str, Any]]:
    """Return each option's probability, after the completion's reasoning and without any.

    As `rlmed.reliability` computes them; after is None for a completion that opens no answer.
    """
    from rlmed.evaluation.option_likelihood import answer_opening, letter_probabilities

    opening = answer_opening(text)
    cases = [(prompt, ANSWER)] if opening is None else [(prompt, ANSWER), (prompt, opening)]
    scored = letter_probabilities(cases, policy=model.policy, renderer=model.renderer, token_budget=TOKEN_BUDGET)
    direct, *after = (entry.tolist() for entry in scored)
    return [
        {"letter": letter, "text": option, "direct": direct[place], "after": after[0][place] if after else None}
        for place, (letter, option) in enumerate(zip(LETTERS, prompt.example.options, strict=False))
    ]
