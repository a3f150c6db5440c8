"""An LLM judge on any OpenAI-compatible server: it marks the answer of each completion."""

from __future__ import annotations

import base64
import email.utils
import importlib.util
import io
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rewards.extra import RewardError
from rewards.references import said
from rewards.slow import Noted, RewardUnavailableError
from rewards.verdict import read_mark
from rlmed.core.config.rewarding import JudgeConfig
from rlmed.core.process.display import quiet_http_clients
from rlmed.core.types import Completion, Example
from rlmed.tasks.registry import task_of

if TYPE_CHECKING:
    from openai import OpenAI
    from PIL.Image import Image

KEY = "RLMED_JUDGE_KEY"
"""Environment variable with the server's key; it is written nowhere."""
INSTALL = "pip install -c requirements.lock -e '.[serve]'"
RETRIED = (408, 409, 425, 429)
"""Statuses below 500 after which another attempt may succeed."""
REFUSED = (401, 403, 404)
"""Statuses that no other completion would change."""
_SHOWN = 200
"""Most characters of a reply or an error in a message."""
_PLACEHOLDER = re.compile(r"\{(question|truth|answer|low|high)\}")

LoadImage = Callable[[Path], "Image"]


class Judge:
    """Asks the server about one completion at a time; see `rewards.slow.BatchCall`.

    Example:
        >>> judge = Judge(config.reward.judge, load_image)                    # doctest: +SKIP
        >>> judge([example], [completion])                                    # doctest: +SKIP
        [0.7]
    """

    def __init__(self, config: JudgeConfig, load_image: LoadImage | None = None) -> None:
        """Make a client; nothing is asked yet.

        Args:
            config: server, question and scale.
            load_image: opens a picture; needed where `config.images` is set.

        Raises:
            ValueError: without a server, or the package openai.
        """
        if config.url is None or config.model is None:
            raise ValueError("reward.weights.judge needs a judge: set reward.judge.url and reward.judge.model")
        if importlib.util.find_spec("openai") is None:
            raise ValueError(f"reward.judge needs the package openai: {INSTALL} (or pip install 'openai>=2.20,<4')")
        self._config, self._load_image, self._url, self._model = config, load_image, config.url, config.model
        self._key = os.environ.get(KEY, "")
        self._client = self._make_client()

    @property
    def settings(self) -> dict[str, Any]:
        """What its marks depend on, besides question and answer; the server's address is not."""
        config = self._config
        return {
            "model": config.model,
            "template": config.template,
            "scale": list(config.scale),
            "images": config.images,
            "max_tokens": config.max_tokens,
        }

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[float]:
        """Return the mark of each answer, on a scale from 0 to 1, with the judge's words.

        Raises:
            RewardUnavailableError: if it does not answer, or gives no mark.
            RewardError: if the server refuses all requests.
        """
        return [self._mark(*pair) for pair in zip(examples, completions, strict=True)]

    def _mark(self, example: Example, completion: Completion) -> float:
        reply = self._reply(self._question(example, completion))
        low, high = self._config.scale
        mark = read_mark(reply, low, high)
        if mark is None:
            said = f"its reply has no mark between {low:g} and {high:g}: {self._shown(reply)!r}"
            raise RewardUnavailableError(said, answered=True)
        return Noted((mark - low) / (high - low), reply)

    def _question(self, example: Example, completion: Completion) -> list[dict[str, Any]]:
        low, high = self._config.scale
        values = {
            "question": task_of(example).question_text(example),
            "truth": truth_text(example),
            "answer": said(completion),
            "low": f"{low:g}",
            "high": f"{high:g}",
        }
        # in one pass: what stands in a question or an answer is not replaced in turn
        text = _PLACEHOLDER.sub(lambda found: values[found[1]], self._config.template)
        if not self._config.images:
            return [{"role": "user", "content": text}]
        assert self._load_image is not None
        pictures = [_image_part(self._load_image(path)) for path in example.images]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]

    def _reply(self, messages: list[dict[str, Any]]) -> str:
        import openai

        try:
            response: Any = self._client.chat.completions.create(
                model=self._model, messages=messages, temperature=0, max_tokens=self._config.max_tokens
            )
            content = response.choices[0].message.content
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APIConnectionError as error:  # a time limit, too
            raise RewardUnavailableError(f"{self._url}: {self._shown(error)} ({type(error).__name__})") from None
        except (openai.APIError, ValueError, AttributeError, TypeError, LookupError) as error:
            raise RewardUnavailableError(f"{self._url} sent no chat completion: {self._shown(error)}") from None
        if not isinstance(content, str) or not content.strip():
            raise RewardUnavailableError(f"{self._url} sent an empty reply", answered=True)
        return content

    def _refusal(self, error: Any) -> Exception:
        """Return what to raise for an HTTP status."""
        status = int(error.status_code)
        said = f"{self._url}: status {status}, {self._shown(error)}"
        if status in REFUSED:
            hint = f"set the environment variable {KEY}" if status != 404 else "check reward.judge.url and .model"
            return RewardError(f"reward judge: {said}: {hint}, and continue with resume=auto")
        again = status >= 500 or status in RETRIED
        return RewardUnavailableError(said, again=again, after_s=retry_after(error.response.headers))

    def _shown(self, said: object) -> str:
        """Return a text for a message: short, on one line, without the key."""
        text = " ".join(str(said).split())
        text = text.replace(self._key, "…") if self._key else text
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"

    def _make_client(self) -> OpenAI:
        import openai

        quiet_http_clients()
        # no proxy lies between this machine and itself
        http = openai.DefaultHttpxClient(trust_env=not _is_here(urlsplit(self._url).hostname or ""))
        return openai.OpenAI(
            base_url=self._url,
            api_key=self._key or "none",
            max_retries=0,  # `rewards.slow` counts attempts
            timeout=self._config.timeout_s,
            http_client=http,
        )


def truth_text(example: Example) -> str:
    """Return what is right, as the judge reads it: an option, or a task's truth.

    Of several accepted answers or references, each is a line.
    """
    if example.is_choice:
        return f"{example.letter}) {example.options[example.answer]}"
    truth = example.truth if isinstance(example.truth, dict) else {}
    accepted = truth.get("answers") or truth.get("references")
    return "\nor\n".join(accepted) if accepted else task_of(example).right_answer(example)


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that a server asks to wait; 0 if it does not, or not intelligibly.

    Example:
        >>> retry_after({"retry-after": "3"}), retry_after({"retry-after": "soon"})
        (3.0, 0.0)
    """
    said = headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", said.strip()):
        return float(said)
    try:
        when = email.utils.parsedate_to_datetime(said).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return max(0.0, when - time.time())


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _image_part(image: Image) -> dict[str, Any]:
    content = io.BytesIO()
    image.save(content, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
