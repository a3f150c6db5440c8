"""Write a run folder's report as one self-contained HTML page: `python -m rlmed.report RUN_FOLDER`.

Missing parts (no evaluation yet, a killed run) are left out. Model output is shown as text, never
as markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlmed.core.files.atomic import replace_text
from rlmed.core.files.damage import read_json
from rlmed.core.files.jsonlines import read_json_lines
from rlmed.core.process.display import one_line
from rlmed.core.tracing import TIMELINE_LINES
from rlmed.evaluation.records import p_value_text
from rlmed.evaluation.results import EvalSummary
from rlmed.models.tiny.toy import EMBEDDED, TOY_NOTE
from rlmed.recording.inputs import CONFIG_FILE, DATA_FILE, VERSIONS_FILE
from rlmed.recording.progress import duration
from rlmed.recording.recorder import METRICS_FILE, ROLLOUTS_FILE
from rlmed.report.accuracy import accuracy_table, scores_by_task, show_faithfulness, show_rules
from rlmed.report.evaluations import Evaluations
from rlmed.report.headline import headline
from rlmed.report.leakage import show_leakage
from rlmed.report.plots import draw_accuracy, draw_metrics
from rlmed.report.reliability import show_reliability
from rlmed.report.rollouts import Pictures, show_groups, show_rows

REPORT_FILE = "report.html"
TEMPLATE, SCRIPT, SHEET = "report.html.j2", "report.js", "report.css"
ASSETS = Path(__file__).parent / "assets"
MOST_CONFIG = 2**16
"""Characters of a run's configuration."""
TILES = 4
"""Most files with a headline accuracy; all are in the table."""
NAMES = 6
"""Most data files in the title; all are at the end of the page."""
SKIPPED_SHOWN = 200
"""Most skipped rows to list by data file; all are in data.json."""


def write_report(run_folder: Path, *, sft: Path | None = None) -> Path:
    """Write `report.html` into a run folder and return its path.

    Args:
        run_folder: run folder of any command.
        sft: run folder of the supervised baseline, whose last evaluation joins the table.

    Raises:
        ValueError: if the folder is not a run, a file is damaged, or the baseline has other files.
        OSError: if a file cannot be read or the report cannot be written.
    """
    if not any((run_folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE, "evaluations")):
        inner = sorted(path.parent for path in run_folder.glob(f"*/{CONFIG_FILE}"))
        near = f"; {inner[-1]} is one" if inner else ""
        raise ValueError(
            f"{run_folder} is not a run folder: it has no config.yaml, {METRICS_FILE} or evaluations{near}"
        )
    environment = page_environment()
    page = environment.get_template(TEMPLATE).render(_context(run_folder, environment, sft))
    return replace_text(run_folder / REPORT_FILE, page)


def page_environment() -> Environment:
    """Return the Jinja environment of `rlmed/report/assets`, with filters that format figures."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,  # completions come from a model: none of their text may become markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "duration": duration,
        "seconds": _seconds,
        "p_value": p_value_text,
        "number": _number,
    }
    return environment


def _context(folder: Path, environment: Environment, sft: Path | None) -> dict[str, Any]:
    config_file = folder / CONFIG_FILE
    config_text, config = read_config(config_file)
    metrics = list(read_json_lines(folder / METRICS_FILE))
    evaluations = Evaluations.read(folder / "evaluations", sft)
    if evaluations.sft is not None:
        _check_common_file(folder, evaluations.summaries, f"--sft {sft}", evaluations.sft)
    versions = _read_json(folder / VERSIONS_FILE) or {}
    data = _read_json(folder / DATA_FILE) or {"files": []}
    pictures = Pictures()
    accuracy = draw_accuracy(evaluations.summaries)
    facts = _run_facts(folder, config, metrics, evaluations)
    script, sheet = (_asset(environment, name) for name in (SCRIPT, SHEET))
    return {
        "run": {
            **facts,
            "device": versions.get("cuda_device") or versions.get("cpu"),
            # earlier versions did not record it
            "toy": TOY_NOTE if versions.get("toy_model") or str(facts["model"]).startswith(EMBEDDED) else None,
            "questions": _names([file["name"] for file in data["files"]]),
        },
        "table": accuracy_table(evaluations),
        "scores": scores_by_task(evaluations),
        "rules": show_rules(evaluations),
        "faithfulness": show_faithfulness(evaluations),
        "reliability": None if evaluations.reliability is None else show_reliability(evaluations.reliability),
        "plots": ([accuracy] if accuracy else []) + draw_metrics(metrics),
        "timeline": time_by_stage(folder / TIMELINE_LINES),
        "groups": show_groups(folder / ROLLOUTS_FILE, pictures),
        "rows": show_rows(evaluations.first_rows, evaluations.last_rows, pictures),
        "pictures": pictures.uris,
        "data": _data(data),
        "leakage": show_leakage(data.get("leakage"), evaluations.last_rows, pictures),
        "versions": versions,
        "config_text": config_text,
        "script": script,
        "sheet": sheet,
        # the browser runs only our script, should markup ever slip through
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _asset(environment: Environment, name: str) -> Markup:
    assert environment.loader is not None
    # trusted: our own file
    return Markup(environment.loader.get_source(environment, name)[0].strip())


def _start(path: Path, characters: int) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(characters)


def read_config(path: Path) -> tuple[str, dict[Any, Any]]:
    """Return a run's configuration as text and as a mapping; empty without the file.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        text = _start(path, MOST_CONFIG + 1) if path.exists() else ""
        if len(text) > MOST_CONFIG:
            raise ValueError(f"{path} is no run's configuration: it has more than {MOST_CONFIG} characters")
        # an alias stands for what may itself have aliases: a few lines would fill the memory
        if any(isinstance(one, yaml.AliasEvent) for one in yaml.parse(text)):
            raise ValueError(f"{path} is no run's configuration: it has aliases")
        config = OmegaConf.to_container(OmegaConf.create(text))
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is damaged, not valid YAML ({one_line(error)}): copy its folder again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged, not a mapping: copy its folder again")
    return text, config


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _run_facts(
    folder: Path, config: Mapping[Any, Any], metrics: Sequence[Mapping[str, Any]], evaluations: Evaluations
) -> dict[str, Any]:
    """Return the headline: what ran, how far it got, and its results."""
    last = metrics[-1] if metrics else {}
    # not of every step: rewards may all be missing in one
    learns_by_reward = any(name.startswith("reward/") for line in metrics for name in line)
    planned = config.get("steps") if learns_by_reward else None
    model = (config.get("model") or {}).get("path") or next((one.model for one in evaluations.summaries), "")
    tiles = []
    if evaluations.summaries:
        for name in [file.name for file in evaluations.ends[-1].files][:TILES]:
            shares = [file.accuracy.value for one in evaluations.ends for file in one.files if file.name == name]
            tiles.append(_tile(f"{name}, %", shares, "accuracy on held-out questions"))
        formats = [float(np.mean([file.format_rate for file in one.files])) for one in evaluations.ends]
        tiles.append(_tile("in the format, %", formats, "mean of the files"))
    for name, label, form in (
        ("reward/mean", "reward", "{:.2f}"),
        ("completion/length", "length, tokens", "{:.0f}"),
        ("kl", "KL", "{:.3f}"),
    ):
        if (ends := headline(metrics, name)) is not None:
            values = [form.format(value) for value in (ends.start, ends.end) if value is not None]
            tiles.append({"label": label, "values": values, "note": ends.note})
    return {
        "name": config.get("name") or folder.resolve().name,
        "generated": (config.get("data") or {}).get("source") == "phantom",
        "model": model,
        "steps": last.get("step", 0),
        "planned": planned,
        "stopped": planned is not None and last.get("step", 0) < planned,
        "skipped_steps": int(last.get("skipped_steps") or 0),
        "tiles": tiles,
    }


def _names(files: Sequence[str]) -> str:
    return ", ".join(files[:NAMES]) + ", …" * (len(files) > NAMES)


def _check_common_file(folder: Path, own: Sequence[EvalSummary], given: str, baseline: EvalSummary) -> None:
    """Raise ValueError if the baseline shares no file with the run."""
    names, others = ([file.name for one in summaries for file in one.files] for summaries in (own[-1:], [baseline]))
    if not set(names) & set(others):
        raise ValueError(
            f"{given} was evaluated on {', '.join(others)}, but {folder} on {', '.join(names) or 'nothing'}: give a "
            "baseline evaluated on the same files"
        )


def _tile(label: str, shares: Sequence[float], note: str) -> dict[str, Any]:
    return {"label": label, "values": [_percent(share) for share in shares], "note": note}


def time_by_stage(path: Path) -> dict[str, Any] | None:
    """Return seconds by stage, without nested spans, and the time outside of any stage.

    None without a timeline.
    """
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    end = 0.0
    for span in read_json_lines(path):
        end = max(end, span["start"] + span["duration"])
        if span["depth"] == 0:
            seconds[span["name"]] += span["duration"]
            counts[span["name"]] += 1
    if not end:
        return None
    stages = [
        {"name": name, "seconds": spent, "share": spent / end, "count": counts[name]}
        for name, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    other = max(0.0, end - sum(seconds.values()))
    return {
        "seconds": end,
        "stages": [*stages, {"name": "other", "seconds": other, "share": other / end, "count": None}],
    }


def _data(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    # earlier versions counted neither rows that keep their order nor those beyond the limit
    return [
        {"kept_order": 0, "beyond_limit": 0, **file, "shown": file["skipped"][:SKIPPED_SHOWN]}
        for file in content["files"]
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
