"""Ask a served export about images: the same question, options and reading as `rlmed.ask`.

    vllm serve models/mine --served-model-name mine ...      # the whole line is in models/mine/README.md
    python examples/serve/client.py image.png "Which organ is shown?" --options liver spleen kidney

The server puts the prompt of training around the question (it is in the export's chat template), so
only question, options and pictures are sent. Needs the packages rlmed and openai, and no torch on
this machine beyond rlmed's own installation: none is imported.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlmed.core.parsing import answer_text, evaluated_letter
from rlmed.core.prefill import THINK, THINK_END
from rlmed.core.process.display import ending_errors
from rlmed.core.types import LETTERS, Example
from rlmed.data.images import check_image, load_image
from rlmed.data.options.choices import plain_options
from rlmed.models.tiny.toy import TOY_NOTE, is_toy

NOTE = "For research only, not for clinical use."
CURES = {
    400: "; --max-tokens is for a longest answer that fits --max-model-len",
    401: "; give --key",
    404: "; does the address end in /v1, and is --model a name that it serves?",
}
"""What to try, by the status with which a server refuses."""
MAX_TOKENS = 512
BANNED = -100
"""Bias on a token's logit that keeps it out."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Ask a served rlmed export about one image or several.")
    parser.add_argument("images", type=Path, nargs="*", metavar="image", help="picture files, in their order")
    parser.add_argument("question", help="its text, in quotes")
    parser.add_argument("--options", nargs="+", default=[], metavar="TEXT", help="answers to choose from")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server's (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="as served (default: the first that the server names)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="the export: keeps out what its settings suppress")
    parser.add_argument("--key", default="none", help="of a server started with --api-key")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest answer, reasoning included (default: that of --folder, or 512)",
    )
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="seconds to wait for the answer")
    return parser.parse_args(arguments)


def message(images: Sequence[Path], question: str, options: Sequence[str]) -> dict[str, Any]:
    """Return the user's turn: pictures as rlmed reads them, question, one line for each option.

    Raises:
        ValueError: for a picture that cannot be read or is blank, invalid options, or no question.
    """
    if os.path.isfile(question):
        raise ValueError(f"the question {question!r} is a file: write the question after the last image, in quotes")
    text = Example("", None, question, asked_options(options)).question_text if options else question
    parts: list[dict[str, Any]] = []
    for path in images:
        check_image(path)
        content = io.BytesIO()
        load_image(path).save(content, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def asked_options(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the options without their own letters, in letter order.

    Raises:
        ValueError: for too few, too many or repeated ones.
    """
    try:
        return plain_options(texts)
    except ValueError as error:
        raise ValueError(f"--options {' '.join(texts)}: {error}; write each in quotes, with spaces between") from error


def export_settings(folder: Path | None) -> tuple[dict[str, int], int]:
    """Return what vLLM does not read of an export itself: a bias, and the longest answer in tokens.

    The bias keeps out tokens that stand for images.

    Raises:
        ValueError: if the folder is no export.
    """
    if folder is None:
        return {}, MAX_TOKENS
    path = folder / "generation_config.json"
    if not path.is_file():
        raise ValueError(f"--folder {folder} has no {path.name}: name the folder that rlmed.export wrote")
    settings = json.loads(path.read_text(encoding="utf-8"))
    bias = {str(token): BANNED for token in settings.get("suppress_tokens") or ()}
    return bias, settings.get("max_new_tokens") or MAX_TOKENS


def ask(given: argparse.Namespace) -> str:
    """Return what the served model writes, greedily.

    Raises:
        ValueError: for a wrong argument, or a server that refuses or does not answer.
    """
    turn = message(given.images, given.question, given.options)
    bias, longest = export_settings(given.folder)
    try:
        import openai
    except ImportError as error:
        raise ValueError("the package openai is missing: pip install 'openai>=2.20,<4'") from error
    client = openai.OpenAI(base_url=given.url, api_key=given.key, timeout=given.timeout, max_retries=0)
    try:
        model = given.model or client.models.list().data[0].id
        response = client.chat.completions.create(
            model=model,
            messages=[turn],
            temperature=0,  # else vLLM samples
            max_tokens=longest if given.max_tokens is None else given.max_tokens,
            logit_bias=bias,
        )
    except openai.APIStatusError as error:
        cure = CURES.get(error.status_code, "")
        raise ValueError(f"{given.url} refused the question ({error.status_code}): {error.message}{cure}") from error
    except openai.APIError as error:
        raise ValueError(f"{given.url} does not answer ({error.message}): is `vllm serve` running there?") from error
    return response.choices[0].message.content or ""


def read(written: str, options: Sequence[str]) -> tuple[str, str]:
    """Return reasoning and answer in words, as `rlmed.ask` prints them.

    A chat template may have opened the reasoning itself: then the text begins inside it.

    Raises:
        ValueError: for invalid options.
    """
    before, closed, _ = written.partition(THINK_END)
    reasoning = before.partition(THINK)[2] if THINK in before else before
    reasoning = reasoning.strip() if closed else ""
    if not options:
        return reasoning or "(none)", answer_text(written) or f"(none; the model wrote: {written!r})"
    letter, texts = evaluated_letter(written), asked_options(options)
    if letter is None or letter not in LETTERS[: len(texts)]:
        return reasoning or "(none)", f"(no option; the model wrote: {written!r})"
    return reasoning or "(none)", f"{letter}) {texts[LETTERS.index(letter)]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print reasoning and answer; on an error, print one line and exit with status 2."""
    given = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    with ending_errors():
        reasoning, answer = read(ask(given), given.options)
    toy = f"note       {TOY_NOTE}\n" if given.folder and is_toy(given.folder) else ""
    sys.stdout.write(f"reasoning  {reasoning}\nanswer     {answer}\n{toy}{NOTE}\n")


if __name__ == "__main__":
    main()
