"""A model that a person asks: its prompt of training and an engine, one completion at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cached_property

from PIL import Image
from transformers.utils.logging import disable_progress_bar

from rlmed.cluster.engines import recorded_renderer
from rlmed.core.types import Completion, Example, Prompt, RolloutRequest, SamplingParams
from rlmed.models.folder.agreement import position_doubt
from rlmed.models.loading import model_folder
from rlmed.models.policy import Policy, load_config, load_policy
from rollout.native.engine import NativeEngine
from rollout.native.scheduler import EngineLimits


class AskedModel:
    """A model folder, whose weights are loaded when it is first asked.

    Example:
        >>> model = AskedModel("embedded:tiny_base")                            # doctest: +SKIP
        >>> prompt = model.render(example)                                      # doctest: +SKIP
        >>> for text, completion in model.sample(prompt, SamplingParams(0.0)):  # doctest: +SKIP
        ...     print(text)
    """

    def __init__(self, path: str) -> None:
        """Read the prompt of a model folder (an adapter's among them) or `embedded:NAME`.

        Raises:
            ValueError: for one that is missing or damaged.
        """
        disable_progress_bar()  # rlmed has its own
        self.path = path
        self.folder = model_folder(path)
        self.renderer = recorded_renderer(self.folder)

    @cached_property
    def policy(self) -> Policy:
        """The model with its weights."""
        return load_policy(self.folder)

    @cached_property
    def _engine(self) -> NativeEngine:
        limits = EngineLimits(max_prompt_tokens=self.renderer.max_prompt_tokens)
        return NativeEngine(self.policy, self.renderer.decode, limits)

    def render(self, example: Example, pictures: Sequence[Image.Image] | None = None) -> Prompt:
        """Return the prompt of an example, with other pictures than its own if given."""
        return self.renderer.render(example) if pictures is None else self.renderer.render(example, pictures)

    def doubt(self, prompt: Prompt, max_tokens: int, flag: str = "") -> str | None:
        """Return a warning if prompt and completion pass the positions that the model has.

        `flag` is what precedes `max-tokens` in it.
        """
        return position_doubt(
            load_config(self.folder),
            tokens=len(prompt.token_ids) + max_tokens,
            what=f"{len(prompt.token_ids)} tokens of the prompt and {flag}max-tokens {max_tokens}",
            advice=f"{flag}max-tokens",
        )

    def sample(self, prompt: Prompt, sampling: SamplingParams) -> Generator[tuple[str, Completion | None]]:
        """Yield the text so far after each token; at last the whole text, and the completion.

        Closing the iterator ends the completion.
        """
        engine = self._engine
        engine.submit(RolloutRequest(index=0, prompt=prompt, group_size=1, sampling=sampling))
        try:
            while engine.busy:
                for group in engine.step():
                    yield group.completions[0].text, group.completions[0]
                for text in engine.partial_texts(0):
                    yield text, None
        finally:
            engine.abort()
