"""The benchmark beside vLLM gives every side the same work and adds up what they took.

No test asserts a time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import rollout_sides
from benchmarks.common import Timing, find_model, make_renderer, never_end
from benchmarks.rollout_sides import (
    BUSY,
    Workload,
    busy_process,
    linear_layers_side,
    make_prompts,
    native_side,
    served_side,
)
from benchmarks.rollout_speed import summarise
from rlmed.models.policy import load_policy
from rlmed.models.tiny.build import build_tiny_text
from tests.unit.benchmarks.sides import die, serve


@pytest.mark.parametrize("length", [54, 300])
def test_prompts_with_images_have_the_length_and_keep_the_image(tmp_path: Path, length: int) -> None:
    model, _ = find_model(None, tmp_path)
    work = Workload(length, group_size=8, prompts=8, max_tokens=4)
    prompts = make_prompts(make_renderer(model), tmp_path, work, images=True)
    assert [len(prompt.token_ids) for prompt in prompts] == [length] * 8
    assert len({prompt.image_inputs["pixel_values"].tobytes() for prompt in prompts}) == 8


def test_a_length_without_room_for_the_image_is_refused(tmp_path: Path) -> None:
    model, _ = find_model(None, tmp_path)
    with pytest.raises(SystemExit, match="--lengths 20 are too few"):
        make_prompts(make_renderer(model), tmp_path, Workload(20, 8, 3, 4), images=True)


@pytest.mark.parametrize("length", [16, 54, 300])
def test_no_two_text_prompts_begin_alike(tmp_path: Path, length: int) -> None:
    build_tiny_text(tmp_path / "model")
    prompts = make_prompts(make_renderer(tmp_path / "model"), tmp_path, Workload(length, 8, 4, 4), images=False)
    assert [len(prompt.token_ids) for prompt in prompts] == [length] * 4
    assert len({tuple(prompt.token_ids[:16]) for prompt in prompts}) == 4


def test_the_lead_is_the_one_on_the_fastest_of_the_others() -> None:
    seconds = {"native": 2.0, "linear_layers": 1.0, "generate": 6.0, "vllm_eager": 3.0}
    result = summarise({name: Timing((value,)) for name, value in seconds.items()}, tokens=600)
    assert result["tokens_per_s"] == {"native": 300.0, "linear_layers": 600.0, "generate": 100.0, "vllm_eager": 200.0}
    assert (result["best_other"], result["ratio"], result["products"]) == ("vllm_eager", 1.5, 3.0)


def test_the_products_have_the_rows_and_the_layers_of_decoding(tmp_path: Path) -> None:
    build_tiny_text(tmp_path)
    policy, work = load_policy(tmp_path), Workload(54, group_size=8, prompts=2, max_tokens=4)
    prompts = make_prompts(make_renderer(tmp_path), tmp_path, work, images=False)
    policy.decoder = None  # it computes the layers' products itself, not through their modules
    seen: Counter[tuple[int, ...]] = Counter()
    for module in policy.model.modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_hook(
                lambda module, given, _: seen.update([(given[0].shape[-2], *module.weight.shape)])
            )
    linear_layers_side(policy, work)()
    alone = seen.copy()
    assert {rows for rows, *_ in alone} == {16}
    seen.clear()
    never_end(policy)
    native_side(policy, prompts, str, work.group_size, work.max_tokens)()
    decoded = Counter({entry: count for entry, count in seen.items() if entry[0] == 16})
    # the engine computes the vocabulary's product itself, not through its module
    assert alone - decoded == {(16, *policy.projection.weight.shape): 3}
    assert decoded - alone == {}


def test_a_side_in_another_process_answers_with_its_seconds_and_less_work_is_an_error() -> None:
    with served_side(serve, [0.5, 0.25, "vLLM made 3 tokens"]) as side:
        assert [side(), side()] == [0.5, 0.25]
        with pytest.raises(RuntimeError, match=r"vLLM made 3 tokens"):
            side()


def test_a_process_that_ends_early_is_an_error_at_once() -> None:
    with pytest.raises(RuntimeError, match="has ended"), served_side(die):
        pass


@pytest.mark.parametrize("wanted", [True, False])
def test_the_busy_process_lives_as_long_as_the_context(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    started = []

    class Noted(rollout_sides.subprocess.Popen):  # type: ignore[name-defined,type-arg]
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            started.append(self)

    monkeypatch.setattr(rollout_sides.subprocess, "Popen", Noted)
    with busy_process(wanted):
        assert [process.poll() for process in started] == [None] * wanted
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def test_the_busy_process_ends_with_a_benchmark_that_is_killed() -> None:
    start = f"subprocess.Popen([sys.executable, '-c', {BUSY!r}, str(os.getpid())])"
    script = f"import os, subprocess, sys; print({start}.pid, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        busy = int(parent.stdout.readline())
        os.kill(busy, 0)
        parent.kill()
    for _ in range(600):
        state = Path(f"/proc/{busy}/stat")
        if not state.exists() or state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(busy, signal.SIGKILL)
    pytest.fail("the busy process has outlived its parent")
