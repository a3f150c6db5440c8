"""Check that an exported folder answers as the run's checkpoint does, whoever computes.

Greedy answers to the same questions, full texts, in float32:

| who | model | prompt |
| --- | --- | --- |
| the checkpoint | the native engine on the run's checkpoint | rlmed's, as in training |
| `rlmed.ask` | the native engine on the exported folder | rlmed's, as the folder records it |
| transformers | `generate` on the exported folder | its chat template, around the bare question |
| `vllm serve` | vLLM's server on the exported folder | the same, by an OpenAI client |

Sums in another order differ in the last digits, so two tokens that are about equally likely may be
taken either way. Where answers part there, it is a tie, and no difference.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlmed.cluster.engines import recorded_renderer
from rlmed.core.prefill import joined
from rlmed.core.types import Example, Prompt, RolloutRequest, SamplingParams
from rlmed.data.examples import read_examples
from rlmed.data.images import load_image
from rlmed.data.prompts import PromptRenderer
from rlmed.models.families import family_of
from rlmed.models.policy import Policy, load_config, load_policy
from rlmed.tasks.registry import task_of
from rollout.native.engine import NativeEngine

TIE = 1e-3
"""Log-probabilities this close are equal but for rounding in float32.

Ten times what two right computations of the test models differ by: real models are deeper.
"""
MAX_TOKENS = 512
"""Longest answer if the run does not say."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Example:
        Answer(prompt_ids=(1, 44, 9), token_ids=(7, 2), text="<answer>B</answer>")
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Without the end token."""
    text: str
    """From the chat template's prefill on."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Two answers to one question that part."""

    id: str
    who: str
    expected: str
    found: str
    why: str
    tie: bool
    """Whether both are right: the tokens where they part are equally likely."""

    def lines(self) -> list[str]:
        """Return it for the terminal."""
        return [
            f"{self.id}, {self.who}: {self.why}",
            f"  checkpoint: {self.expected!r}",
            f"  {self.who}: {self.found!r}",
        ]


def choose_questions(files: Sequence[Path], count: int) -> list[Example]:
    """Return the first questions of each file in turn, at most `count` in all."""
    rows = [read_examples(path).examples for path in files]
    found = (example for turn in zip_longest(*rows) for example in turn if example is not None)
    return list(islice(found, count))


class Reference:
    """The checkpoint's own answers, and its log-probabilities where others part from them."""

    def __init__(
        self, checkpoint: Path, dtype: str, examples: Sequence[Example], max_tokens: int, *, wrapped: bool = True
    ) -> None:
        """Load the checkpoint as it was exported, in `dtype`, and answer in float32.

        `wrapped`: whether the exported chat template has the prompt of training.
        """
        self.wrapped = wrapped
        self.policy = load_policy(checkpoint)
        if dtype != "float32":  # rounding is part of the export
            rounded = dict(load_policy(checkpoint, dtype=dtype).model.named_parameters())
            with torch.no_grad():
                for name, parameter in self.policy.model.named_parameters():
                    parameter.copy_(rounded[name])
        self.renderer = recorded_renderer(checkpoint)
        self.prompts = [self.renderer.render(example) for example in examples]
        self.answers = native_answers(self.policy, self.renderer, self.prompts, max_tokens)

    def differences(self, who: str, others: Sequence[Answer]) -> list[Difference]:
        """Compare the answers of `who` to the first questions with the checkpoint's."""
        found = []
        for prompt, own, other in zip(self.prompts, self.answers, others, strict=False):
            if own.prompt_ids != other.prompt_ids:
                why = f"its prompt is another one, of {len(other.prompt_ids)} tokens and not {len(own.prompt_ids)}"
                if own.text == other.text:
                    why += ", though the answer is the same"
                found.append(Difference(prompt.example.id, who, own.text, other.text, why, tie=False))
            elif own.text != other.text:
                apart = self._apart(prompt, own, other)
                tie = apart is not None and apart < TIE
                why = "other characters" if apart is None else f"log-probabilities {apart:.1e} apart where they part"
                found.append(
                    Difference(prompt.example.id, who, own.text, other.text, why + (" (a tie)" if tie else ""), tie)
                )
        return found

    @torch.no_grad()
    def _apart(self, prompt: Prompt, own: Answer, other: Answer) -> float | None:
        """Return how far apart the first two tokens that differ are; None if none does."""
        pairs = zip_longest(own.token_ids, other.token_ids)
        same = next((index for index, (one, two) in enumerate(pairs) if one != two), None)
        if same is None:
            return None
        ids = torch.tensor([*own.prompt_ids, *own.token_ids[:same]])
        positions = self.policy.prompt_positions(prompt)
        after = positions.max() + 1 + torch.arange(same).expand(len(positions), same)
        hidden = self.policy.hidden(
            ids.to(self.policy.device),
            torch.cat([positions, after], dim=1).to(self.policy.device),
            self.policy.packed_layout([(len(own.prompt_ids), [same] if same else [])], ids.to(self.policy.device)),
            self.policy.image_inputs(prompt),
        )
        logprobs = self.policy.logits(hidden[-1:]).log_softmax(1)[0]
        # an answer that has ended there took the likeliest of its end tokens
        end = max(self.policy.end_token_ids, key=lambda token: float(logprobs[token]))
        one, two = (answer.token_ids[same] if same < len(answer.token_ids) else end for answer in (own, other))
        return float((logprobs[one] - logprobs[two]).abs())


@torch.inference_mode()
def native_answers(policy: Policy, renderer: PromptRenderer, prompts: Sequence[Prompt], limit: int) -> list[Answer]:
    """Answer by the native engine, as evaluation and `ask` do."""
    engine = NativeEngine(policy, renderer.decode)
    sampling = SamplingParams(temperature=0.0, max_tokens=limit)
    for index, prompt in enumerate(prompts):
        engine.submit(RolloutRequest(index, prompt, 1, sampling))
    groups = []
    while engine.busy:
        groups += engine.step()
    answers = []
    for group in sorted(groups, key=lambda group: group.request.index):
        (completion,) = group.completions
        ids = completion.token_ids.tolist()
        answers.append(Answer(tuple(group.prompt.token_ids.tolist()), without_end(ids, policy), completion.text))
    return answers


def without_end(token_ids: Sequence[int], policy: Policy) -> tuple[int, ...]:
    """Return an answer's tokens up to its end token."""
    ends = (index for index, token in enumerate(token_ids) if token in policy.end_token_ids)
    return tuple(token_ids[: next(ends, len(token_ids))])


def ask_answers(folder: Path, examples: Sequence[Example], limit: int) -> list[Answer]:
    """Answer as `rlmed.ask` does with this model folder."""
    renderer = recorded_renderer(folder)
    return native_answers(load_policy(folder), renderer, [renderer.render(example) for example in examples], limit)


def transformers_answers(folder: Path, reference: Reference, examples: Sequence[Example], limit: int) -> list[Answer]:
    """Answer by `generate`, with the folder's chat template, processor and generation settings."""
    renderer = recorded_renderer(folder)  # for its tokenizer and processor, which are transformers'
    vision = family_of(load_config(folder)).vision
    auto: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32)
    model.to(reference.policy.device)
    answers = []
    for example, prompt in zip(examples, reference.prompts, strict=False):
        inputs = _inputs(renderer, example, wrapped=reference.wrapped)
        given = inputs["input_ids"].shape[1]
        output = model.generate(**inputs.to(reference.policy.device), max_new_tokens=limit)
        written = output[0, given:].tolist()
        written = without_end(written, reference.policy)  # it may be a plain word, which is dropped, too
        text = joined(prompt.prefill, renderer.decode(written))
        answers.append(Answer(tuple(inputs["input_ids"][0].tolist()), written, text))
    return answers


def _inputs(renderer: PromptRenderer, example: Example, *, wrapped: bool) -> Any:
    """Return what the folder's chat template and transformers' processor make of a question."""
    images = [load_image(path) for path in example.images]
    text = renderer.tokenizer.apply_chat_template(
        question_turn(renderer, example, [{"type": "image"} for _ in images], wrapped=wrapped),
        tokenize=False,
        add_generation_prompt=True,
        **modality_of(renderer, example),
    )
    if not images:
        return renderer.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    assert renderer.pictures is not None
    processor: Any = renderer.pictures.processor
    return processor(text=[text], images=[images], return_tensors="pt")


def question_turn(
    renderer: PromptRenderer, example: Example, pictures: Sequence[dict[str, Any]], *, wrapped: bool
) -> list[dict[str, Any]]:
    """Return the messages that users send.

    They are a bare question with its options or labels, or, if the chat template has not the prompt
    of training (`wrapped`), the whole user turn.
    """
    question = task_of(example).question_text(example) if wrapped else renderer.templates.content(example)
    content: Any = [*pictures, {"type": "text", "text": question}] if pictures else question
    return [{"role": "user", "content": content}]


def modality_of(renderer: PromptRenderer, example: Example) -> dict[str, Any]:
    """Return the chat template's `modality`, where there are prompts by modality."""
    known = example.is_choice and renderer.templates.by_modality and example.modality
    return {"modality": example.modality} if known else {}


def compare(reference: Reference, who: str, answer: Callable[[], list[Answer]]) -> list[Difference]:
    """Return where the answers of `who` part from the checkpoint's; their model is freed."""
    found = reference.differences(who, answer())
    gc.collect()
    return found
