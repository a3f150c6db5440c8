"""What a half hour with a GPU should decide: each part in a process of its own.

`python -m benchmarks.gpu_day` runs every part and prints a short table of each; name some to run
only these. A part that fails or runs out of time is reported, and the others go on. `--smoke` runs
all of them with the tiny model on the CPU, in a minute or two.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import RESULTS, ROOT, report, write_result

PARTS = {"probe": 120, "decode": 300, "learner": 300, "kernels": 180, "loop": 500}
"""Each part's seconds at most, in the order in which they run."""
FAILED = 1


def device_facts() -> dict[str, Any]:
    """Return name, memory and versions of the GPU; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def run_part(name: str, arguments: argparse.Namespace, scratch: Path) -> None:
    """Run one part in this process, write its result and print its table."""
    disable_progress_bar()
    part = importlib.import_module(f"benchmarks.gpu.{name}")
    results, table = part.run(arguments, scratch)
    payload = {"gpu": device_facts(), "smoke": arguments.smoke, **results}
    report("\n".join(table))
    write_result(f"gpu_day_{name}", payload, arguments.out)


def start_part(name: str, arguments: argparse.Namespace, scratch: Path) -> str:
    """Run one part in a process of its own; return how it ended."""
    command = [sys.executable, "-m", "benchmarks.gpu_day", name, "--here", "--model", arguments.model]
    command += ["--out", str(arguments.out), "--scratch", str(scratch), *(["--smoke"] if arguments.smoke else [])]
    interpret = {"TRITON_INTERPRET": "1"} if arguments.smoke and name in ("decode", "kernels") else {}
    start = time.perf_counter()
    report(f"\n== {name}")
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | interpret, timeout=PARTS[name], check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {PARTS[name]} s"
    taken = time.perf_counter() - start
    return f"done in {taken:.0f} s" if done.returncode == 0 else f"failed with status {done.returncode}"


def main() -> None:
    """Run the parts; exit with status 1 if one of them did not finish."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--model", choices=("tiny", "2b", "7b"), help="geometry (default 2b; with --smoke: tiny)")
    parser.add_argument("--smoke", action="store_true", help="the tiny model on the CPU, few rounds: does it all run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--scratch", type=Path, help="folder for models and runs (default: a temporary one)")
    parser.add_argument("--here", action="store_true", help="run one part in this process")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        parser.error(f"unknown part {unknown[0]!r}: expected some of {', '.join(PARTS)}")
    if not (arguments.smoke or torch.cuda.is_available()):
        parser.error("no CUDA device: use --smoke to run everything with the tiny model on the CPU")
    arguments.model = arguments.model or ("tiny" if arguments.smoke else "2b")
    arguments.out = arguments.out.resolve()
    if arguments.here:
        run_part(arguments.parts[0], arguments, arguments.scratch)
        return
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (arguments.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        ends = {name: start_part(name, arguments, scratch) for name in arguments.parts or PARTS}
    report(f"\n{json.dumps(ends, indent=1)}")
    if any(not end.startswith("done") for end in ends.values()):
        raise SystemExit(FAILED)


if __name__ == "__main__":
    main()
