"""A model is loaded straight to its device: the host holds no copy of its weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from rlmed.models import policy as policy_module
from rlmed.models.policy import load_config, load_policy
from tests.root import ROOT

CODE = """
import tests.prepared
import sys
from pathlib import Path
from rlmed.models import policy

class Loaded(Exception):
    pass

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def on_its_way(model, device, dtype):
    print(peak() - before, sum(parameter.nbytes for parameter in model.parameters()))
    raise Loaded

policy.load_policy(Path(sys.argv[1]))  # the modules that loading imports
policy._move = on_its_way  # no accelerator is here to move to
before = peak()
try:
    policy.load_policy(Path(sys.argv[2]), dtype=sys.argv[3], device="meta")
except Loaded:
    pass
"""
"""Prints the memory taken when the parameters start for their device, and the weights' bytes."""


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model's folder, and that of the same with 64 MiB of bfloat16 weights."""
    tiny = tiny_folder("qwen2")
    config = load_config(tiny)
    config.vocab_size = 2**19
    large = tmp_path_factory.mktemp("large")
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (large / path.name).write_bytes(path.read_bytes())
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(large)
    return tiny, large


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_for_another_device_takes_no_memory_of_the_host(dtype: str, folders: tuple[Path, Path]) -> None:
    command = [sys.executable, "-c", CODE, *map(str, folders), dtype]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    taken, weights = map(int, done.stdout.split()[-2:])
    assert weights >= 60 * 2**20
    assert taken < weights / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_moved_parameters_get_the_dtype_buffers_keep_theirs_and_ties_stay(
    dtype: torch.dtype, folders: tuple[Path, Path]
) -> None:
    expected = load_policy(folders[0], dtype=str(dtype).removeprefix("torch."))
    moved = load_policy(folders[0])
    policy_module._move(moved.model, torch.device("cpu"), dtype)
    for mine, theirs in (
        (moved.model.named_parameters(), expected.model.named_parameters()),
        (moved.model.named_buffers(), expected.model.named_buffers()),
    ):
        mine, theirs = dict(mine), dict(theirs)
        assert mine.keys() == theirs.keys()
        assert all(mine[name].dtype == value.dtype and torch.equal(mine[name], value) for name, value in theirs.items())
    assert moved.projection.weight is moved.model.get_input_embeddings().weight
