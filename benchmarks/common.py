"""What the benchmarks share: arguments, model, prompts, alternating timing, machine facts, JSON."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from rlmed.core.process.threads import usable_cores
from rlmed.core.types import Completion, Example, Prompt, SamplingParams
from rlmed.data.examples import read_examples
from rlmed.data.phantom.studies import write_split
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.data.templates import PROMPT_SUFFIX
from rlmed.models.loading import model_folder
from rlmed.models.policy import Policy
from rlmed.models.tiny.build import build_tiny

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
DEFAULT_MODEL = "embedded:tiny_base"
MAX_PROMPT_TOKENS = 1024
SETTLE_SECONDS = 0.3
VISUAL_TOKEN_SIDE = 28
"""Pixels of an image that make one visual token, along each side."""

Side = Callable[[], float]
"""Does the measured work once and returns its seconds."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the same work, measured several times.

    Example:
        >>> Timing((2.0, 1.0, 4.0)).summary()
        {'min_s': 1.0, 'median_s': 2.0, 'runs_s': [2.0, 1.0, 4.0]}
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """Minimum in seconds."""
        return min(self.seconds)

    def summary(self) -> dict[str, Any]:
        """For the result file."""
        runs = [round(value, 4) for value in self.seconds]
        return {"min_s": round(self.fastest, 4), "median_s": round(self.median, 4), "runs_s": runs}


def timed(work: Callable[[], object]) -> Side:
    """A side that runs `work` and takes its wall time."""

    def side() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return side


def alternate(
    sides: Mapping[str, Side], *, rounds: int, warmup: int = 1, settle_s: float = SETTLE_SECONDS
) -> dict[str, Timing]:
    """Run the sides in turn, A B A B …, so that a machine that slows down slows all of them down.

    Args:
        sides: by name; the first `warmup` runs of each do not count.
        rounds: counted runs of each side.
        warmup: runs before that.
        settle_s: pause before each run, in which the other side's idle threads stop spinning.

    Raises:
        ValueError: when nothing would be counted.
    """
    if rounds < 1 or not sides:
        raise ValueError(f"rounds={rounds} of {len(sides)} sides measures nothing: use at least one of each")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, side in sides.items():
            gc.collect()
            time.sleep(settle_s)
            taken = side()
            if turn >= warmup:
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def add_arguments(parser: argparse.ArgumentParser, *, rounds: int, model: bool = True) -> None:
    """The arguments of every benchmark; `model` for those that measure one."""
    if model:
        parser.add_argument(
            "--model", help="model folder; default: the tiny base that ships with rlmed, else random weights"
        )
    parser.add_argument("--threads", type=int, default=usable_cores(), help="torch threads (default: all usable cores)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"counted runs of each side (default {rounds})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result (default benchmarks/results)")


def start(arguments: argparse.Namespace) -> None:
    """Set the number of threads, and keep transformers' progress bars out of the results."""
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()


def find_model(argument: str | None, scratch: Path) -> tuple[Path, str]:
    """Folder and name of the model; if rlmed ships no base, random weights are put in `scratch`."""
    if argument is not None:
        return model_folder(argument), Path(argument).name
    try:
        return model_folder(DEFAULT_MODEL), DEFAULT_MODEL
    except ValueError:
        folder = scratch / "random_tiny"
        examples = write_examples(scratch / "corpus", 60)
        build_tiny(folder, corpus=[example.question_text for example in examples], phrases=[PROMPT_SUFFIX])
        return folder, "build_tiny, random weights"


def write_examples(folder: Path, count: int) -> tuple[Example, ...]:
    """Generated MRI questions with 112x112 images on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_split(folder, name="benchmark", modality="MRI", rows=count, seed=0)
    return tuple(read_examples(path).examples)


def with_visual_tokens(model: Path, count: int, folder: Path) -> Path:
    """Copy a model folder so that images have `count` visual tokens or a few more."""
    shutil.copytree(model, folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    pixels = count * VISUAL_TOKEN_SIDE**2
    # older folders have the first two names, newer ones "edges", which are numbers of pixels too
    settings |= {"min_pixels": pixels, "max_pixels": pixels, "size": {"shortest_edge": pixels, "longest_edge": pixels}}
    path.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def make_renderer(model: Path) -> PromptRenderer:
    """The renderer of the paper's prompt for a model folder."""
    return PromptRenderer(*load_processor(model), max_prompt_tokens=MAX_PROMPT_TOKENS)


def render_prompts(renderer: PromptRenderer, examples: Sequence[Example], *, images: bool = True) -> list[Prompt]:
    """The prompts of the examples, with or without their images."""
    return [renderer.render(entry if images else dataclasses.replace(entry, image=None)) for entry in examples]


def spread(lengths: Sequence[int]) -> dict[str, int]:
    """The shortest and the longest, for the result file."""
    return {"min": min(lengths), "max": max(lengths)}


def never_end(policy: Policy) -> None:
    """Let completions run to full length whatever is sampled, so all sides do the same work."""
    policy.end_token_ids = frozenset()


def sampling(max_tokens: int, seed: int = 0) -> SamplingParams:
    """Plain sampling at temperature 1, nothing filtered."""
    return SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=max_tokens, seed=seed)


def variety_reward(example: Example, completion: Completion) -> float:
    """Share of distinct characters: differs between completions, so advantages are not all zero."""
    return len(set(completion.text)) / max(1, len(completion.text))


def model_facts(policy: Policy, name: str) -> dict[str, Any]:
    """What was measured, without its path."""
    layers, kv_heads, width = policy.kv_shape
    return {
        "name": name,
        "type": policy.model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
        "vocabulary": policy.projection.out_features,
        "layers": layers,
        "hidden_size": policy.projection.in_features,
        "kv_heads": kv_heads,
        "head_width": width,
        "dtype": str(policy.dtype).removeprefix("torch."),
    }


def fit(columns: Mapping[str, Sequence[float]], values: Sequence[float]) -> dict[str, float]:
    """Fit values as a sum of columns, each times a coefficient, by least squares.

    Returns:
        The coefficient of each column; "residual", the root mean square of the differences as a
        share of the values' mean; "r2", the explained share of their variance.

    Example:
        >>> fit({"fixed": [1, 1, 1], "a_token": [10, 20, 30]}, [3.0, 5.0, 7.0])
        {'fixed': 1.0, 'a_token': 0.2, 'residual': 0.0, 'r2': 1.0}
    """
    table, measured = np.array(list(columns.values()), dtype=float).T, np.array(values)
    coefficients = np.linalg.lstsq(table, measured, rcond=None)[0]
    squares = ((measured - table @ coefficients) ** 2).mean()
    found = dict(zip(columns, coefficients.tolist(), strict=True))
    found |= {"residual": squares**0.5 / measured.mean(), "r2": 1 - squares / measured.var()}
    return {name: float(f"{value:.4g}") if abs(value) > 1e-12 else 0.0 for name, value in found.items()}


def machine_facts() -> dict[str, Any]:
    """Processor, threads and versions; nothing that tells whose machine it is."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "trl", "numpy", "rlmed")},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "rlmed", "rollout", "learner", "rewards")),
    }


def write_result(name: str, payload: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write `folder/name.json`: the machine first, then the payload."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"benchmark": name, "machine": machine_facts(), **payload}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def report(text: str) -> None:
    """One line of progress or result."""
    print(text, flush=True)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository; None outside of one."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
