"""How fast does the studio find rollouts among 100,000?

A run folder with as many generated completions, eight a group and some 110 words each, is shown by
the studio's own application, asked without a network. First page and filters are whole pages, from
the request to the last byte of HTML, in the address's order: each query is asked `--rounds` times
after the index is whole, without any cache of pages. `while_indexing` is the first page that is
asked for with an empty cache folder: it waits for the first part of the index only.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from benchmarks.common import RESULTS, report, write_result
from rlmed.studio.server import build
from rlmed.studio.state import Studio

GROUP = 8
GROUPS_PER_STEP = 32
LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
MODALITIES = ("CT", "MRI", "XRAY")
FILTERS = {
    "first page": "",
    "a common word": "words=image",
    "two words, one rare": "words=effusion+image",
    "the beginning of a word": "words=ef",
    "a letter": "words=a",
    "beginnings of three words": "words=th+im+le",
    "beginnings of eight words": "words=th+im+le+lu+up+ab+an+sh",
    "a word that occurs nowhere": "words=zebrafish",
    "rewards": "reward_from=0.9&reward_to=1.1",
    "steps": "step_from=50&step_to=60",
    "modality, sorted by reward": "modality=CT&sort=worst",
    "words, steps and rewards, sorted by length": "words=lesion&step_from=20&reward_from=1&sort=longest",
    "last page": "page=100000",
    "last page of a common word": "words=image&page=100000",
}
"""Addresses by what they ask."""


def write_run(folder: Path, completions: int, *, seed: int = 0) -> Path:
    """Write a run folder with generated rollouts; return its rollouts.jsonl."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    made = ("".join(generator.choice(list(LETTERS), size=length)) for length in generator.integers(2, 10, 20_000))
    words = np.array(["the", "image", "lesion", "left", "upper", "lung", *made])
    weights = 1.0 / np.arange(1, len(words) + 1)
    weights /= weights.sum()
    Image.fromarray(generator.integers(0, 255, (128, 128), dtype=np.uint8)).save(folder / "image.png")
    steps = -(-completions // (GROUP * GROUPS_PER_STEP))
    lines = ({"step": step, "reward/mean": 1.0 + step / steps} for step in range(1, steps + 1))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"steps: {steps}\n")
    path = folder / "rollouts.jsonl"
    with path.open("w") as file:
        for index in range(completions // GROUP):
            texts = [" ".join(generator.choice(words, size=110, p=weights)) for _ in range(GROUP)]
            if index % 500 == 0:
                texts[0] += " pleural effusion"
            group = {
                "step": index // GROUPS_PER_STEP + 1,
                "index": index,
                "example_id": f"row-{index % 600}",
                "image": str(folder / "image.png"),
                "question": f"Which abnormality, if any, does image {index % 600} show?",
                "options": ["hemorrhage", "mass", "no lesion", "cyst"],
                "answer": "B",
                "modality": MODALITIES[index % 3],
                "question_type": "disease",
                "completions": [
                    {
                        "text": f"<think>{text}</think>\n<answer>{'ABCD'[int(generator.integers(4))]}</answer>",
                        "reward": float(generator.integers(0, 3)),
                        "reward_parts": {"format": 1.0, "choice": 1.0},
                        "advantage": 0.0,
                        "tokens": int(generator.integers(40, 400)),
                        "finish_reason": "stop",
                        "min_version": 1,
                        "max_version": 1,
                    }
                    for text in texts
                ],
            }
            file.write(json.dumps(group) + "\n")
    return path


def asked(client: TestClient, address: str, rounds: int) -> dict[str, float]:
    """Return seconds of a page: the median and the longest."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        answer = client.get(address)
        seconds.append(time.perf_counter() - start)
        assert answer.status_code == 200, answer.text
    return {"median_s": round(float(np.median(seconds)), 4), "longest_s": round(max(seconds), 4)}


def measure(scratch: Path, completions: int, rounds: int) -> dict[str, Any]:
    """Return sizes and seconds for a run of that many completions."""
    rollouts = write_run(scratch / "runs" / "large", completions)
    studio = Studio([scratch / "runs"], token=None, cache=scratch / "cache")
    client = TestClient(build(studio), base_url="http://localhost")
    start = time.perf_counter()
    at_once = client.get("/rollouts?run=large")
    while_indexing = time.perf_counter() - start
    index = studio.indexing.index(rollouts)
    while not index.whole:
        time.sleep(0.05)
    indexing = time.perf_counter() - start
    assert at_once.status_code == 200
    pages = {}
    for what, query in FILTERS.items():
        pages[what] = asked(client, f"/rollouts?run=large&{query}", rounds)
        report(f"{what}: {pages[what]}")
    return {
        "completions": completions,
        "rollouts_mb": round(rollouts.stat().st_size / 1e6, 1),
        "index_mb": round(sum(path.stat().st_size for path in (scratch / "cache").iterdir()) / 1e6, 1),
        "while_indexing_s": round(while_indexing, 3),
        "indexing_s": round(indexing, 1),
        "list_of_runs": asked(client, "/", rounds),
        "pages": pages,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write `studio_index.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studio_index", description=__doc__)
    parser.add_argument("--completions", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5, help="times that each page is asked for")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        content = measure(Path(temporary), parsed.completions, parsed.rounds)
    versions = {"sqlite": sqlite3.sqlite_version, **{name: version(name) for name in ("starlette", "jinja2")}}
    write_result("studio_index", {"versions": versions, **content}, parsed.out)


if __name__ == "__main__":
    main()
