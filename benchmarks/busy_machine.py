"""What do the ways in which OpenMP's threads wait cost, alone and beside one other busy process?

Rollouts of the embedded model (8 prompts x 8 completions x 64 tokens) in a fresh process for each
way, since OpenMP reads its variables when torch is loaded; the ways take turns. Where cores are
shared, a thread that spins takes the time of the one it waits for.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ROOT,
    add_arguments,
    find_model,
    make_renderer,
    never_end,
    render_prompts,
    report,
    start,
    timed,
    write_examples,
    write_result,
)
from benchmarks.rollout_sides import busy_process, native_side
from rlmed.core.process.threads import WAITING
from rlmed.models.policy import load_policy

WAYS: dict[str, dict[str, str]] = {
    "OpenMP's own": {"GOMP_SPINCOUNT": "300000"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 5000, 20000)},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "rlmed": {},
}
PROMPTS, GROUP_SIZE, TOKENS = 8, 8, 64


def sample(arguments: argparse.Namespace) -> None:
    """In a process of its own: print the tokens a second, median of the rounds."""
    start(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder, _ = find_model(arguments.model, Path(scratch))
        policy, renderer = load_policy(folder), make_renderer(folder)
        never_end(policy)
        prompts = render_prompts(renderer, write_examples(Path(scratch) / "questions", PROMPTS))
        side = timed(native_side(policy, prompts, renderer.decode, GROUP_SIZE, TOKENS))
        side()
        seconds = statistics.median(side() for _ in range(arguments.rounds))
    report(f"{PROMPTS * GROUP_SIZE * TOKENS / seconds:.1f}")


def tokens_per_second(way: str, arguments: argparse.Namespace) -> float:
    """One process of this way."""
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    chosen = WAYS[way]
    command = [sys.executable, "-m", "benchmarks.busy_machine", "--child", "--rounds", str(arguments.rounds)]
    command += ["--threads", str(arguments.threads)] + (["--model", arguments.model] if arguments.model else [])
    done = subprocess.run(command, cwd=ROOT, env=clean | chosen, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each way, alone and busy."""
    speeds: dict[str, dict[str, list[float]]] = {way: {"alone": [], "busy": []} for way in WAYS}
    for _ in range(arguments.turns):
        for label in ("alone", "busy"):
            with busy_process(label == "busy"):
                for way in WAYS:
                    speeds[way][label].append(tokens_per_second(way, arguments))
    best = statistics.median(speeds["OpenMP's own"]["alone"])
    found = {}
    for way, sides in speeds.items():
        alone, busy = (statistics.median(sides[label]) for label in ("alone", "busy"))
        found[way] = {
            "alone": alone,
            "busy": busy,
            "alone_share": round(alone / best, 3),
            "busy_share": round(busy / best, 3),
        }
        report(f"{way}: {alone:.0f} tokens/s alone ({alone / best:.0%}), {busy:.0f} busy ({busy / best:.0%})")
    return {"ways": found, "runs": speeds}


def main() -> None:
    """Measure and write `busy_machine.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, rounds=3)
    parser.add_argument("--turns", type=int, default=3, help="processes of each way, alone and busy")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sample(arguments)
        return
    report(f"written to {write_result('busy_machine', measure(arguments), arguments.out)}")


if __name__ == "__main__":
    main()
