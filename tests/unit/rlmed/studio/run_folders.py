"""Small run folders and a client for the studio over them."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image
from starlette.testclient import TestClient

from rlmed.evaluation.results import write_evaluation
from rlmed.studio.server import build
from rlmed.studio.state import Studio
from tests.unit.rlmed.report.test_page import line, row, summary, write_lines

HOST = "http://localhost:8642"
SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}


def write_run(folder: Path, *, steps: int = 3, planned: int = 3, report: bool = True, **changes: object) -> Path:
    """Write a run of `steps` steps with two groups of two completions each; return its folder."""
    folder.mkdir(parents=True)
    image = folder.parent / f"{folder.name}.png"
    Image.new("L", (40, 30), 120).save(image)
    (folder / "config.yaml").write_text(
        f"name: run\nseed: {changes.pop('seed', 0)}\nsteps: {planned}\nalgo:\n  group_size: 2\n"
    )
    (folder / "versions.json").write_text('{"cpu": "a processor", "packages": {"torch": "2.13"}}')
    names = ("step", "reward/mean", "reward/format", "kl", "completion/length")
    write_lines(
        folder / "metrics.jsonl",
        [dict(zip(names, (n, n / 2, 1.0, 0.01 * n, 20.0), strict=True)) for n in range(1, steps + 1)],
    )
    groups = [
        line(step=step, index=2 * step + i, image=str(image), question=f"Which part shows number {i}?", **changes)
        for step in range(1, steps + 1)
        for i in range(2)
    ]
    write_lines(folder / "rollouts.jsonl", groups)
    spans = [{"name": "rollout", "start": 0.0, "duration": 3.0, "step": 1, "depth": 0}]
    write_lines(folder / "timeline.jsonl", [*spans, {**spans[0], "name": "learn", "start": 3.0, "duration": 1.0}])
    rows = [row(number, number < 3) for number in range(4)]
    for step in (0, steps):
        write_evaluation(folder / "evaluations", summary(step, rows), rows)
    if report:
        (folder / "report.html").write_text("<p>done</p>")
    return folder


def client_of(*folders: Path, cache: Path, token: str | None = None, images: Sequence[Path] = ()) -> TestClient:
    """Return a browser without cookies for a studio over the folders."""
    studio = Studio([folder.resolve() for folder in folders], token=token, cache=cache, images=images)
    return TestClient(build(studio), base_url=HOST, follow_redirects=False)


def pictures_of(client: TestClient, page: str, place: str = "image") -> list[dict[str, Any]]:
    """Return the parameters of the addresses of a page's pictures, in order."""
    text = client.get(page).text
    return [dict(parse_qsl(html.unescape(query))) for query in re.findall(rf'src="/{place}\?([^"]*)"', text)]
