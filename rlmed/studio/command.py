"""The command `python -m rlmed.studio [FOLDER ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from rlmed.core.process.display import ending_errors, keep_display
from rlmed.studio.cache import cache_folder
from rlmed.tasks.registry import settle_tasks

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT, LAST_PORT = 8642, 65535
TOKEN = "RLMED_STUDIO_TOKEN"
"""Environment variable: arguments of a command can be read by all users of a machine."""
TOKEN_BYTES, LEAST_TOKEN = 24, 16
INSTALL = "pip install -c requirements.lock -e '.[studio]' in rlmed's checkout"
MISSING = "rlmed.studio needs starlette and uvicorn ({error}): " + INSTALL


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the studio over the folders given on the command line, until Ctrl-C."""
    parser = _parser()
    keep_display()
    parsed = parser.parse_args(arguments)
    with ending_errors(interrupted="studio: ended"):
        if parsed.no_token and parsed.host not in LOOPBACK:
            raise ValueError(f"--no-token with --host {parsed.host} would let anyone in: leave one of them out")
        if not 0 <= parsed.port <= LAST_PORT:
            raise ValueError(f"--port {parsed.port}: choose 0, for a free one, to {LAST_PORT}")
        for model in parsed.model:
            if not model.startswith("embedded:"):
                _folder(Path(model), f"--model {model} is not a folder: name one that holds a model")
        folders = [_folder(path) for path in parsed.folders or [Path("outputs")]]
        settle_tasks(parsed.extra_tasks, parsed.synonyms, key="--extra-tasks")
        token = None if parsed.no_token else os.environ.get(TOKEN, "").strip() or secrets.token_urlsafe(TOKEN_BYTES)
        if token is not None and len(token) < LEAST_TOKEN:
            raise ValueError(
                f"{TOKEN} has {len(token)} characters: give at least {LEAST_TOKEN}, or unset it for a random one"
            )
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        try:
            from rlmed.studio.server import serve
            from rlmed.studio.state import Studio
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("starlette", "uvicorn", "anyio", "multipart"):
                raise
            raise ValueError(MISSING.format(error=error)) from error
        images = [
            _folder(path, f"--images {path} is not a folder: name one that holds pictures") for path in parsed.images
        ]
        if (here := Path.cwd()) != Path(here.anchor):
            images.append(here)
        cache = parsed.cache or cache_folder()
        studio = Studio(folders, token=token, cache=cache, models=parsed.model, images=images)
        serve(studio, parsed.host, parsed.port, parsed.allow_host, say=_say)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rlmed.studio",
        description="Show run folders in a browser.",
        epilog=f"The environment variable {TOKEN} holds the secret that opens the pages; without it, it is a random one.",
    )
    parser.add_argument(
        "folders", type=Path, nargs="*", metavar="FOLDER", help="run folders, or folders that hold them (outputs)"
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="DIR",
        help="a model folder that can be asked, such as an export",
    )
    parser.add_argument(
        "--images",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="another folder whose pictures are shown, besides FOLDER and the working folder",
    )
    parser.add_argument("--host", default=LOOPBACK[0], help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--no-token", action="store_true", help="let every user of this machine in")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="another name that browsers reach it by"
    )
    parser.add_argument(
        "--extra-tasks", nargs="+", default=[], metavar="MODULE:CLASS", help="as data.extra_tasks of the runs"
    )
    parser.add_argument("--synonyms", metavar="FILE", help="as data.synonyms of the runs")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="folder of the search index (~/.cache/rlmed/studio)"
    )
    return parser


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _folder(path: Path, refusal: str = "") -> Path:
    if not path.is_dir():
        raise ValueError(refusal or f"{path} is not a folder: name one that holds run folders")
    return path.resolve()
