"""Records that flow through the loop, one frozen type per stage.

Example -> Prompt -> RolloutGroup -> ScoredGroup -> TrainGroup. A stage takes one type and returns
the next, so scored and unscored data cannot be confused. Arrays are numpy: nothing here needs
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort"]
BoxFrame = Literal["thousandths", "pixels"]
"""Units in which a model writes boxes: thousandths of its picture's width and height, or pixels of
the picture as the model is given it, after its image processor's resizing.
"""
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

LETTERS = "ABCDEFGHIJ"
"""Option letters in order; a question has 2 to 10 options (MedVLM-R1's data)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question about no, one or several images, as read from a data file.

    Multiple choice has `options` and `answer`; other tasks (`rlmed.tasks`) have `truth`.

    Example:
        >>> Example(id="mri-7", image=Path("images/7.png"), question="Which body part is shown?",
        ...         options=("head", "chest", "abdomen", "knee"), answer=3, modality="MRI").letter
        'D'
    """

    id: str
    image: Path | None
    """Absolute path of the first image file; None for a question without an image."""
    question: str
    options: tuple[str, ...] = ()
    """2 to 10 distinct option texts, in letter order; empty for other tasks."""
    answer: int = -1
    """Index of the right option in `options`; -1 for other tasks."""
    modality: str = ""
    """"MRI", "CT", "X-ray" or another name; empty where unknown."""
    kind: str = ""
    """Kind of question, for example "anatomy"; empty where unknown."""
    completion: str | None = None
    """A reference completion, for supervised fine-tuning only."""
    more_images: tuple[Path, ...] = ()
    """Absolute paths of the images after the first, in the order in which the model sees them."""
    task: str = "choice"
    """Name of its task, see `rlmed.tasks.registry`."""
    truth: Any = None
    """What is right, as the task's `read` returned it, in JSON's types; None for choice."""

    def __post_init__(self) -> None:
        """Raise ValueError for more images without a first one, or options where none belong."""
        if (self.task == "choice") != bool(self.options):
            raise ValueError(
                f"Example {self.id} has task={self.task!r} and options={self.options}; only and all of choice have options"
            )
        if self.more_images and self.image is None:
            raise ValueError(
                f"Example {self.id} has more_images={self.more_images} but no image; put the first in `image`"
            )

    @property
    def images(self) -> tuple[Path, ...]:
        """All images in order: none, one or several."""
        return () if self.image is None else (self.image, *self.more_images)

    @property
    def is_choice(self) -> bool:
        """Whether it is multiple choice."""
        return self.task == "choice"

    @property
    def letter(self) -> str:
        """The letter of the right option; raises ValueError for other tasks."""
        if not self.is_choice:
            raise ValueError(f"example {self.id} has task={self.task} and no letters: use rlmed.tasks.registry.task_of")
        return LETTERS[self.answer]

    @property
    def question_text(self) -> str:
        r"""The question, then one line per option, if there are any.

        Example:
            >>> Example(id="1", image=None, question="Which?", options=("head", "knee"), answer=0).question_text
            'Which?\nA) head\nB) knee'
        """
        lines = [f"{letter}) {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.question, *lines])


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered example: the model's input, tokenized once.

    Example:
        For a 112x112 image (16 visual tokens) `token_ids` has shape [49] and `image_inputs` holds
        `pixel_values` [64, 1176] float32 and `image_grid_thw` [1, 3] int64.
    """

    example: Example
    text: str
    """The chat-templated text with one unexpanded image placeholder per image."""
    token_ids: IntArray
    """int64 [P]; image placeholders are expanded to one id per visual token."""
    image_inputs: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Image tensors keyed by the model's forward arguments; empty for text-only prompts."""
    prefill: str = ""
    """The completion's beginning as the template put it at the end of `text`, like `<think>\\n`."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are sampled.

    Every field is always sent to the engine; nothing is inherited from a model folder.

    Example:
        >>> SamplingParams(temperature=1.0, max_tokens=64).greedy
        False
    """

    temperature: float = 1.0
    """0 is greedy decoding; logprobs are then those of temperature 1."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1 is off."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 is off."""
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    """Stop strings; the text is kept up to and including the first one."""
    seed: int = 0
    """Seed of the group; completion i of the group draws from a stream of (seed, i) alone."""

    def __post_init__(self) -> None:
        """Raise ValueError for an invalid temperature."""
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"Invalid temperature={self.temperature}; expected 0 (greedy) or a positive number")

    @property
    def greedy(self) -> bool:
        """True for greedy decoding."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """A request to the pool for `group_size` completions of one prompt.

    Example:
        >>> prompt = Prompt(Example("mri-7", None, "Which?", ("head", "knee"), 1), "Which?", np.arange(49))
        >>> RolloutRequest(index=12, prompt=prompt, group_size=8, sampling=SamplingParams(seed=12)).prompt.example.letter
        'B'
    """

    index: int
    """Position in the stream of requests; unique within a run, it identifies the group."""
    prompt: Prompt
    group_size: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation of a prompt.

    Example:
        >>> Completion(np.array([7, 2]), np.array([-0.5, -0.1], np.float32), "<answer>B</answer>", "stop").max_version
        0
    """

    token_ids: IntArray
    """int64 [T], including the end token if one was sampled."""
    rollout_logprobs: FloatArray
    """float32 [T]: log-probability of each token under the distribution it was sampled from."""
    text: str
    """Decoded text from the prefill on (`rlmed.core.prefill.joined`), without special tokens."""
    finish_reason: FinishReason
    min_version: int = 0
    """Smallest policy version that sampled a token of it."""
    max_version: int = 0
    """Largest policy version that sampled a token of it."""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """A finished group: one prompt and its completions, in seed order."""

    request: RolloutRequest
    completions: tuple[Completion, ...]

    @property
    def prompt(self) -> Prompt:
        """The prompt that all completions share."""
        return self.request.prompt

    @property
    def min_version(self) -> int:
        """Smallest policy version that sampled a token of the group."""
        return min(completion.min_version for completion in self.completions)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with its rewards.

    Example:
        Four completions have rewards [2.0, 0.0, 1.0, 2.0] and parts
        {"format": [1, 0, 1, 1], "choice": [1, 0, 0, 1]}.
    """

    rollout: RolloutGroup
    rewards: FloatArray
    """float32 [G], the weighted sum of the parts."""
    reward_parts: Mapping[str, FloatArray]
    """float32 [G] each, before weighting."""
    missing: tuple[str, ...] = ()
    """Weighted rewards that a completion lacks, left out of `rewards` for all of them."""
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What rewards wrote about each completion, G texts by reward; "" for none."""
    rewarded: bool = True
    """False if all weighted rewards are missing: `rewards` are 0 and say nothing."""


@dataclass(frozen=True, slots=True)
class TrainGroup:
    """A scored group with the advantage of each completion: the learner's input.

    Example:
        The rewards [2, 0, 1, 2] give GRPO's advantages [0.78, -1.31, -0.26, 0.78].
    """

    scored: ScoredGroup
    advantages: FloatArray
    """float32 [G]."""

    @property
    def rollout(self) -> RolloutGroup:
        """The group without its rewards."""
        return self.scored.rollout
