"""The model card of an exported folder: what it is, its accuracy with controls, how to ask it.

All figures are read from the run's own files. No path of the exporting machine is in it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlmed.core.chat import SWITCH
from rlmed.data.leakage.findings import WORDS, LeakageReport
from rlmed.evaluation.records import Accuracy, p_value_text
from rlmed.evaluation.results import EvalSummary, FileSummary, read_comparison
from rlmed.export.card_tasks import (
    GIVE,
    asked,
    box_units,
    chance_meaning,
    described,
    prior_meaning,
    right_from,
    score_lines,
    score_meanings,
)
from rlmed.export.check import MAX_TOKENS, Difference
from rlmed.export.folder import Exported
from rlmed.export.server import BANNED
from rlmed.export.source import Source, earlier_models, licence_of, public_name
from rlmed.export.template import CHOICE
from rlmed.models.tiny.toy import EMBEDDED, toy_note

CARD = "README.md"
ASSETS = Path(__file__).parent / "assets"
NONE = "–"

Checked = Mapping[str, tuple[int, Sequence[Difference]]]
"""Number of questions and what differed, by who answered."""


def model_card(
    source: Source, exported: Exported, name: str, *, images: int = 1, checked: Checked | None = None
) -> str:
    """Return the text of the card.

    Args:
        source: the checkpoint and its run.
        exported: what was written.
        name: of the folder.
        images: most of a question.
        checked: result of the check, if there was one.
    """
    environment = Environment(
        loader=FileSystemLoader(ASSETS), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.finalize = lambda value: value if isinstance(value, _Ready) else _plain(value)
    renderer, config = exported.renderer, source.config
    earlier = earlier_models(source)
    vision = renderer.pictures is not None
    summaries = [EvalSummary.read(folder) for folder in source.evaluations]
    comparison = read_comparison(source.evaluations[-1]) if source.evaluations else None
    after = summaries[-1] if summaries and summaries[-1].step == source.step else None
    scores = [] if after is None else score_lines(summaries, after, comparison)
    limit = exported.max_new_tokens or MAX_TOKENS
    values = {
        "header": _Ready(_header(source, earlier, vision=vision)),
        "name": _Ready(name),
        "served": _Ready(shlex.quote(name)),
        "named": _Ready(json.dumps(name)),
        "what": _what(source, earlier, exported.tasks),
        "toy": toy_note(source.checkpoint),
        **_tasks(exported),
        "scores": scores,
        "meanings": score_meanings(scores),
        "files": [] if after is None else _accuracy(summaries, after, comparison),
        "tested": comparison is not None,
        "loo": after is not None and any(file.image_free_prior is None for file in after.files),
        "looked": after is not None and any(file.blank or file.shuffled for file in after.files),
        "best_of": source.best_of,
        "data": _data(source),
        "leakage": _leakage(source),
        "recipe": _recipe(source, exported),
        "switch": SWITCH,
        "modalities": ", ".join(renderer.templates.by_modality) if CHOICE in exported.tasks else "",
        "vision": vision,
        "images": images,
        "stop": _Ready(", ".join(f"`{stop}`" for stop in (config.get("rollout") or {}).get("stop") or ())),
        "model_len": renderer.max_prompt_tokens + limit,
        "max_tokens": limit,
        "bias": _Ready(json.dumps({str(token): BANNED for token in exported.suppressed}))
        if exported.suppressed
        else "",
        "checked": [
            (who, count, count - len(found), sum(difference.tie for difference in found))
            for who, (count, found) in (checked or {}).items()
        ],
        "base": public_name(earlier[-1]) if earlier and not earlier[-1].startswith(EMBEDDED) else "",
    }
    return str(environment.get_template("card.md.j2").render(**values)).rstrip() + "\n"


def _tasks(exported: Exported) -> dict[str, Any]:
    """Return what the card says of the model's tasks."""
    shown = asked(exported.renderer, exported.tasks)
    return {
        "choice": CHOICE in exported.tasks,
        "wrapped": exported.wrapped,
        "shown": [{key: _Ready(text) for key, text in task.items()} for task in shown],
        "asked": _Ready(json.dumps(shown[0]["bare" if exported.wrapped else "turn"])),
        "give": _Ready(
            (GIVE.get(exported.tasks[0], "Give the question.") if exported.wrapped else "Send the whole turn.")
            + box_units(exported.renderer, exported.tasks)
        ),
        "chance_is": chance_meaning(exported.tasks),
        "prior_is": prior_meaning(exported.tasks),
        "right_from": right_from(exported.tasks),
    }


class _Ready(str):
    """Text that goes into the card as it is."""


def _plain(value: Any) -> Any:
    """Return a text of the run's files without what Markdown would take for its own."""
    return value.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") if isinstance(value, str) else value


def _header(source: Source, earlier: Sequence[str], *, vision: bool) -> str:
    """Return the YAML that the hub reads."""
    licences = [found for model in earlier if (found := licence_of(model))]
    header: dict[str, Any] = {}
    if licences:
        header["license"] = licences[-1]
    if earlier:
        header["base_model"] = public_name(earlier[-1])
    tuned = bool((source.config.get("learner") or {}).get("lora", {}).get("rank"))
    header |= {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if vision else "text-generation",
        "tags": ["rlmed", "medical", "radiology", "research-only", *_kind_tags(source), *(["lora"] if tuned else [])],
    }
    return str(yaml.safe_dump(header, sort_keys=False, allow_unicode=True))


def _kind_tags(source: Source) -> list[str]:
    if source.run is None:
        return []
    return ["reinforcement-learning", "grpo"] if "loop" in source.state else ["sft"]


def _what(source: Source, earlier: Sequence[str], tasks: Sequence[str]) -> str:
    bases = " ← ".join(public_name(model) for model in earlier)
    how = "trained"
    if source.run is not None:
        how = "trained by reinforcement learning" if "loop" in source.state else "fine-tuned on answers"
    step = "" if source.step is None else f" for {source.step} steps"
    return f"A model that {described(tasks)}, {how} with rlmed{step}{f' from {bases}' if bases else ''}."


def _accuracy(
    summaries: Sequence[EvalSummary], after: EvalSummary, comparison: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    before = _with_parts(summaries[0]) if len(summaries) > 1 else {}
    files = comparison["files"] if comparison is not None else {}
    by_task = {f"{name}, {task}": one for name, file in files.items() for task, one in file.get("tasks", {}).items()}
    tests = {**files, **by_task}
    several = any(file.blank_one or file.image_order for file in after.files)
    return [
        {
            "name": name,
            "rows": file.rows,
            "before": _measured(before[name].accuracy) if name in before else "",
            "accuracy": f"**{_measured(file.accuracy)}**",
            "p": p_value_text(tests[name]["p_value"]) if name in tests else NONE,
            "format": _percent(file.format_rate),
            "blank": _measured(file.blank),
            "shuffled": _measured(file.shuffled),
            "reordered": _measured(file.other_order),
            "several": several,
            "blank_one": _measured(file.blank_one),
            "image_order": _measured(file.image_order),
            "chance": _percent(file.chance),
            "prior": _percent(_prior(file)),
        }
        for name, file in _with_parts(after).items()
    ]


def _with_parts(summary: EvalSummary) -> dict[str, FileSummary]:
    """Return a summary's files, and behind each those of its tasks, by what the card calls them."""
    return {
        name: line
        for file in summary.files
        for name, line in ((file.name, file), *((f"{file.name}, {part.name}", part) for part in file.parts))
    }


def _prior(file: FileSummary) -> float:
    return file.leave_one_out_prior if file.image_free_prior is None else file.image_free_prior


def _measured(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return NONE
    return f"{_percent(accuracy.value)} ({100 * accuracy.low:.0f}–{100 * accuracy.high:.0f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _data(source: Source) -> list[dict[str, Any]]:
    return [
        {"use": use, **{key: file[key] for key in ("name", "rows", "sha256")}}
        for use, files in (("training", source.trained_on), ("evaluation", source.evaluated_on))
        for file in files
    ]


def _leakage(source: Source) -> str:
    content = source.data.get("leakage")
    if content is None:
        return "not searched for."
    report = LeakageReport.from_json(content)
    found = [
        f"{file.leaking_rows} of {file.rows} rows of {file.name} are in the training data too "
        f"({', '.join(f'{count} {WORDS[kind]}' for kind, count in file.images_by_kind.items())})"
        for file in report.files
        if file.leaking_rows
    ]
    doubtful = sum(file.doubtful for file in report.files)
    unsure = (
        f" {doubtful} pictures look much like a training picture, as different ones of these data do."
        if doubtful
        else ""
    )
    if found:
        return f"{'; '.join(found)}.{unsure}"
    return (
        "no evaluated row was found in the training data (same file, same pixels, altered copies, neighbouring slices, same "
        f"text).{unsure}"
    )


def _recipe(source: Source, exported: Exported) -> list[tuple[str, Any]]:
    """Return what training did, as far as the run recorded it."""
    config, versions = source.config, source.versions
    packages = versions.get("packages", {})
    facts: list[tuple[str, Any]] = [("parameters", f"{exported.parameters:,}"), ("dtype", exported.dtype)]
    if config and "loop" in source.state:
        facts += _reinforcement(config)
    elif config:
        sft = config.get("sft") or {}
        facts += [
            ("method", "supervised fine-tuning"),
            ("epochs", sft.get("epochs")),
            ("rows per step", sft.get("batch_size")),
        ]
    if config:
        learner = config.get("learner") or {}
        lora = learner.get("lora") or {}
        facts += [
            ("steps", source.step),
            ("seed", config.get("seed")),
            (
                "learning rate",
                f"{learner.get('lr')}, {learner.get('lr_schedule')}, warmup {learner.get('warmup_steps')}",
            ),
            ("frozen parts", ", ".join(learner.get("freeze") or ()) or None),
        ]
        if lora.get("rank"):
            parts = ", ".join(lora["target"])
            facts.append(("LoRA", f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {parts}; merged in float32"))
    installed = _version()
    facts += [
        ("longest prompt, tokens", exported.renderer.max_prompt_tokens),
        ("longest answer, tokens", exported.max_new_tokens),
        ("answers end with", _Ready(", ".join(f"`{token}`" for token in exported.end_tokens).replace("|", "\\|"))),
        ("rlmed", packages.get("rlmed") or installed),
        ("commit", versions.get("commit")),
        ("torch, transformers", ", ".join(filter(None, (packages.get("torch"), packages.get("transformers")))) or None),
    ]
    return [(key, value) for key, value in facts if value is not None]


def _reinforcement(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    algo, rollout = config.get("algo") or {}, config.get("rollout") or {}
    loss, reward = algo.get("loss") or {}, config.get("reward") or {}
    given = reward.get("weights") or {}
    own = {name: 1.0 for path in reward.get("extra") or () if (name := path.rpartition(":")[2]) not in given}
    weights = " + ".join(f"{weight:g} × {name}" for name, weight in (given | own).items())
    return [
        (
            "advantage, ratio, clip",
            ", ".join(str(value) for value in (algo.get("advantage"), loss.get("ratio_level"), loss.get("clip"))),
        ),
        (
            "clip bounds, KL weight",
            f"{loss.get('clip_ratio_low')}/{loss.get('clip_ratio_high')}, {loss.get('kl_coef')}",
        ),
        ("completions", f"{algo.get('group_size')} for each of {algo.get('groups_per_step')} prompts a step"),
        ("dynamic sampling", "yes" if algo.get("dynamic_sampling") else "no"),
        ("sampling", f"temperature {rollout.get('temperature')}, at most {rollout.get('max_tokens')} tokens"),
        ("reward", weights or None),
    ]


def _version() -> str | None:
    try:
        return version("rlmed")
    except PackageNotFoundError:
        return None
