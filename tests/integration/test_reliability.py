"""The command on twelve rows of generated images and the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlmed import reliability
from rlmed.core.config.composing import compose_config
from rlmed.data.phantom.studies import make_example as make
from rlmed.data.phantom.studies import render, sample_study
from rlmed.evaluation.reliability.results import ReliabilitySummary

pytestmark = pytest.mark.slow


def test_the_reliability_of_the_embedded_model(tmp_path: Path, capsys) -> None:
    lines = []
    for index in range(12):
        rng = np.random.default_rng([7, index])
        study = sample_study(rng, "MRI", "anatomy")
        path = tmp_path / f"{index}.png"
        Image.fromarray(render(study, rng)).save(path)
        example = make(study, "anatomy", f"{index}", path, rng, index % 4)
        row = {"id": example.id, "image": path.name, "question": example.question, "options": example.options}
        lines.append(json.dumps({**row, "answer": example.options[example.answer], "modality": "MRI"}) + "\n")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(lines))
    folder = tmp_path / "run"
    folder.mkdir()
    settings = ["model.path=embedded:tiny_base", "data=jsonl", f"data.eval=[{data}]", f"data.train={data}"]
    settings += ["reliability.samples=4", "eval.max_tokens=64", "cluster.threads=1"]
    reliability.main(compose_config("reliability", settings), folder)
    summary = ReliabilitySummary.read(folder / "evaluations/step-000000")
    (file,) = summary.files
    rows = [json.loads(line) for line in (folder / "evaluations/step-000000/rows.jsonl").read_text().splitlines()]
    plain = [row for row in rows if row["control"] == "none"]
    greedy = sum(row["correct"] for row in plain)
    # the letter that is likeliest after the model's own reasoning is the one that it wrote
    assert file.reasoned is not None
    assert file.reasoned.accuracy.correct == greedy
    assert file.order.orders[0].correct == greedy
    assert file.agreement.agrees.rows > 6  # the base names the option that it then answers
    assert file.agreement.agrees.value > 0.8
    assert [entry.k for entry in file.sampling.passes] == [1, 2, 4]
    assert summary.domains[0].trained
    assert "Does it use the picture?" in (folder / "report.html").read_text()
    assert "pass@4" in capsys.readouterr().out
