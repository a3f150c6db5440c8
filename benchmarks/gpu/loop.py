"""Whole runs of the launcher: the embedded experiment, then three steps of real geometry."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.gpu.setting import device_of, lines, model_folder_of, rounded

METRICS = ("mismatch_kl", "tokens_per_second", "seconds/rollout", "seconds/learn", "seconds/push_weights")
QUICK = ("steps=1", "eval.at_start=false", "eval.at_end=false", "preflight.enabled=false")
REAL = (*QUICK[1:], "steps=3", "model.dtype=bfloat16", "rollout.max_tokens=128", "learner.gradient_checkpointing=true")


def launch(name: str, overrides: list[str], scratch: Path) -> dict[str, Any]:
    """Run the launcher and return the time and the metrics of its last step.

    Raises:
        RuntimeError: if it fails, with the end of what it printed.
    """
    folder = scratch / f"run_{name}"
    command = [
        sys.executable,
        "-m",
        "rlmed.launch",
        "+experiment=medvqa_600",
        "profile=tiny",
        f"hydra.run.dir={folder}",
    ]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "cluster=local", "rollout=native", *overrides], cwd=ROOT, capture_output=True, text=True, check=False
    )
    taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for key, value in steps[-1].items() if key in METRICS}
    return rounded({"run": name, "seconds": taken, "steps": len(steps), **last})


def run(arguments: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], list[str]]:
    """Measure; return the results and the lines of a short table."""
    device, smoke = device_of(arguments), arguments.smoke
    where = f"model.device={device.type}"
    runs = [launch("embedded", [where, *(QUICK if smoke else ())], scratch)]
    if arguments.model != "tiny":
        folder = model_folder_of(arguments.model, scratch / arguments.model, device, 512)
        runs.append(launch(arguments.model, [where, f"model.path={folder}", *REAL], scratch))
    return {"runs": runs}, lines(runs, ("run", "seconds", "steps", *METRICS))
