"""Find what to export: the checkpoint of a run, and the files that say what the run did."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlmed.core.files.damage import read_json
from rlmed.core.files.near_paths import near_path
from rlmed.evaluation.results import SUMMARY_FILE, EvalSummary, step_folder
from rlmed.export.template import CHOICE
from rlmed.models.folder.adapter import SETTINGS_FILE
from rlmed.models.folder.contents import CONFIG_FILE as MODEL_CONFIG
from rlmed.models.tiny.toy import EMBEDDED
from rlmed.recording.checkpoint import STATE_FILE, list_checkpoints, read_state
from rlmed.recording.inputs import CONFIG_FILE, DATA_FILE, VERSIONS_FILE

STAGES = 8
"""Most runs to go back to the model that the first was trained from."""
_FENCE = "---\n"


@dataclass(frozen=True, slots=True)
class Source:
    """A model to export, and the run that it comes from.

    Example:
        Source(checkpoint=Path("outputs/x/DATE/checkpoints/step-000300"),
               run=Path("outputs/x/DATE"), step=300, best_of=0)
    """

    checkpoint: Path
    """A model folder."""
    run: Path | None
    """The run's folder; None for a model folder without one."""
    step: int | None
    """Step of the checkpoint; None for a model folder that no run has written."""
    best_of: int = 0
    """Number of checkpoints of which it is the most accurate; 0 unless it was chosen for that."""

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration as recorded; empty without a run."""
        return {} if self.run is None else read_config(self.run)

    @property
    def versions(self) -> dict[str, Any]:
        """The run's software and hardware; empty if not recorded."""
        return self._recorded(VERSIONS_FILE)

    @property
    def data(self) -> dict[str, Any]:
        """The run's data files; empty if not recorded."""
        return self._recorded(DATA_FILE)

    @property
    def state(self) -> dict[str, Any]:
        """What the run keeps to resume; empty for a model folder that no run has written."""
        return read_state(self.checkpoint) if (self.checkpoint / STATE_FILE).is_file() else {}

    @property
    def evaluations(self) -> list[Path]:
        """The run's evaluations at its start and at the checkpoint's step, as far as there are."""
        if self.run is None or self.step is None:
            return []
        folders = [step_folder(self.run / "evaluations", step) for step in sorted({0, self.step})]
        return [folder for folder in folders if (folder / SUMMARY_FILE).is_file()]

    @property
    def trained_on(self) -> list[dict[str, Any]]:
        """The file that a run was trained on, as recorded: the first, since it has a checkpoint."""
        return list(self.data.get("files", [])[:1])

    @property
    def evaluated_on(self) -> list[dict[str, Any]]:
        """The files that a run was evaluated on, as recorded."""
        return list(self.data.get("files", [])[1:])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the rows that a run was trained and evaluated on; empty if not known."""
        files = (*self.trained_on, *self.evaluated_on)
        return tuple(sorted({task for entry in files for task in _tasks(self, entry)}))

    @property
    def places(self) -> list[Path]:
        """Folders from which a path that the run recorded may lead on."""
        return [Path(), *(self.run.absolute().parents if self.run is not None else ())]

    def _recorded(self, name: str) -> dict[str, Any]:
        path = None if self.run is None else self.run / name
        return read_json(path) if path is not None and path.is_file() else {}


def find_source(run: Path, checkpoint: str | None) -> Source:
    """Find the checkpoint to export.

    Args:
        run: a run's folder, one of its checkpoints, or any model folder.
        checkpoint: "last" (also None), "best" (by mean accuracy) or a step, of a run's folder.

    Raises:
        ValueError: if there is none such; names those that there are.
    """
    if not run.is_dir():
        raise ValueError(f"{run} does not exist; {near_path(run) or 'give a run folder, such as outputs/NAME/DATE'}")
    saved = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(run / "checkpoints")}
    if saved:
        step, best_of = _choose(run, saved, checkpoint or "last")
        return Source(saved[step], run, step, best_of)
    if checkpoint is not None:
        raise ValueError(f"--checkpoint {checkpoint} is for a run's folder, and {run} has no checkpoints: leave it out")
    if not any((run / name).is_file() for name in (MODEL_CONFIG, SETTINGS_FILE)):
        raise ValueError(
            f"{run} holds neither checkpoints nor a model: give a run folder (outputs/NAME/DATE) or a checkpoint in it"
        )
    folder = run.absolute()
    above = _run_of(folder)
    return Source(folder, above, None if above is None else int(folder.name.removeprefix("step-")))


def _run_of(checkpoint: Path) -> Path | None:
    """Return the folder of the run that wrote a checkpoint; None for other folders."""
    folder = checkpoint.absolute()
    run = folder.parent.parent
    return run if folder in list_checkpoints(run / "checkpoints") and (run / CONFIG_FILE).is_file() else None


def _choose(run: Path, saved: Mapping[int, Path], wanted: str) -> tuple[int, int]:
    """Return the step of a checkpoint, and of how many it is the best if it was chosen for that."""
    if wanted == "last":
        return max(saved), 0
    if wanted == "best":
        measured = {
            step: EvalSummary.read(folder).mean_accuracy
            for step in saved
            if ((folder := step_folder(run / "evaluations", step)) / SUMMARY_FILE).is_file()
        }
        if not measured:
            raise ValueError(
                f"--checkpoint best: no step in {run / 'evaluations'} has a checkpoint ({_steps(saved)}): choose one by its "
                "step"
            )
        return max(measured, key=lambda step: (measured[step], step)), len(measured)
    if not wanted.isdecimal() or int(wanted) not in saved:
        raise ValueError(f"--checkpoint {wanted}: {run} has {_steps(saved)}; give one of them, last or best")
    return int(wanted), 0


def _steps(saved: Mapping[int, Path]) -> str:
    return f"step {', '.join(map(str, sorted(saved)))}"


def read_config(run: Path) -> dict[str, Any]:
    """Return a run's configuration as recorded; empty if it is not there or damaged."""
    path = run / CONFIG_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def earlier_models(source: Source) -> list[str]:
    """Return what the model was trained from: the run's own first.

    As its runs name it, or where that is found from here.
    """
    found: list[str] = []
    folder = source.run or source.checkpoint
    while len(found) < STAGES:
        config = read_config(folder)
        path = (config.get("model") or {}).get("path")
        if path is None and (folder / SETTINGS_FILE).is_file():
            path = read_json(folder / SETTINGS_FILE).get("base_model_name_or_path")
        if not path:
            break
        folder = next((there for place in source.places if (there := place / path).is_dir()), Path(path))
        if str(folder) in found:
            break
        found.append(str(folder))
        folder = _run_of(folder) or folder
    return found


def public_name(model: str) -> str:
    """Return the name of a model for others: that of its folder, without the path.

    Example:
        >>> public_name("/data/models/Qwen2-VL-2B-Instruct"), public_name("embedded:tiny_base")
        ('Qwen2-VL-2B-Instruct', 'rlmed/tiny_base')
    """
    if model.startswith(EMBEDDED):
        return f"rlmed/{model.removeprefix(EMBEDDED)}"
    return Path(model).name


def licence_of(model: str) -> str | None:
    """Return the licence that a model's own card names; None if it is not known here."""
    if model.startswith(EMBEDDED):
        return "apache-2.0"  # it comes with rlmed
    card = Path(model) / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith(_FENCE) or _FENCE not in text[len(_FENCE) :]:
        return None
    try:
        header = yaml.safe_load(text[len(_FENCE) :].partition(_FENCE)[0])
    except yaml.YAMLError:
        return None
    found = header.get("license") if isinstance(header, dict) else None
    return found if isinstance(found, str) else None


def _tasks(source: Source, entry: Mapping[str, Any]) -> set[str]:
    """Return the tasks of the rows of a data file; if they were not recorded, those of the file."""
    if "tasks" in entry:
        return {*entry["tasks"]}
    path = _found(source, entry)
    if path is None:
        return {CHOICE}  # the first versions had no other
    return {_task_of(line) for line in path.read_bytes().splitlines() if line.strip()}


def _task_of(line: bytes) -> str:
    """Return the task of a row; one that is no row was skipped."""
    try:
        row = json.loads(line.removeprefix(BOM_UTF8))
    except ValueError:
        return CHOICE
    return str((isinstance(row, dict) and row.get("task")) or CHOICE)


def _found(source: Source, entry: Mapping[str, Any]) -> Path | None:
    return next((path for place in source.places if (path := place / entry["path"]).is_file()), None)


def evaluated_files(source: Source) -> Iterator[Path]:
    """Yield the run's evaluation files, wherever its paths lead from here.

    Raises:
        ValueError: for a file that is gone.
    """
    for entry in source.evaluated_on:
        found = _found(source, entry)
        if found is None:
            raise ValueError(
                f"{entry['path']}, on which the run was evaluated, is not found from {Path.cwd()} or the run's folder: give "
                "--questions FILE.jsonl, or --check 0"
            )
        yield found
