"""Triton kernels without a GPU: their results under Triton's interpreter, and their compilation for
one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GPU_TESTS = Path(__file__).parents[1] / "gpu"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpret(cases: str) -> str:
    """Run a file of tests in a process of its own: Triton reads the variable when it is imported.

    Returns what pytest printed.
    """
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", str(GPU_TESTS / cases)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kernels_under_the_interpreter() -> None:
    assert "SKIPPED" not in interpret("test_kernels.py")


def test_decode_steps_under_the_interpreter() -> None:
    printed = interpret("test_decode_kernels.py")
    reasons = {line.rpartition(": ")[2] for line in printed.splitlines() if line.startswith("SKIPPED")}
    # what only a device can do
    assert reasons == {"the interpreter does not round to bfloat16", "graphs need a CUDA device"}


HALF, TABLE, FLOAT, DOUBLE = "*bf16", "*i32", "*fp32", "*fp64"
ATTENTION = {
    **dict.fromkeys(("query", "keys", "values"), HALF),
    **dict.fromkeys(("pages", "lengths", "rows"), TABLE),
    "outputs": FLOAT,
    "lse": FLOAT,
    "scale": "fp32",
}
# name of the kernel, types of its arguments (int32 if not named), constants of Qwen2-VL-2B's
# geometry
KERNELS: list[tuple[str, dict[str, str], dict[str, int]]] = [
    (
        "attention._attend",
        ATTENTION,
        {"HEADS": 12, "KV_HEADS": 2, "WIDTH": 128, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 128},
    ),
    (
        "attention._merge",
        {"outputs": FLOAT, "lse": FLOAT, "merged": HALF},
        {"WIDTH": 128, "PARTS": 3, "BLOCK_P": 4, "BLOCK_D": 128},
    ),
    (
        "layer._add_rms_norm",
        {**dict.fromkeys(("residual", "delta", "weight", "normal"), HALF), "epsilon": "fp32"},
        {"WIDTH": 1536, "BLOCK": 2048, "ADD": True},
    ),
    ("layer._silu_mul", {"gate_up": HALF, "product": HALF}, {"BLOCK": 1024}),
    (
        "layer._rope_append",
        {
            **dict.fromkeys(("query", "key", "value", "cos", "sin", "keys", "values"), HALF),
            "pages": TABLE,
            "lengths": TABLE,
        },
        {"HEADS": 12, "WIDTH": 128, "BLOCK": 64},
    ),
    (
        "sampling._reduce",
        {"logits": FLOAT, "temperature": FLOAT, "largest": FLOAT, "sums": DOUBLE},
        {"BLOCK": 1024},
    ),
    (
        "sampling._draw",
        {
            **dict.fromkeys(("logits", "temperature", "largest", "logprobs"), FLOAT),
            "uniform": DOUBLE,
            "sums": DOUBLE,
            "greedy": "*i1",
            "tokens": "*i64",
        },
        {"BLOCK": 1024, "BLOCKS": 256},
    ),
]
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may use, by compute capability (CUDA C++ Programming Guide,
table of limits).
"""


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(("name", "types", "constants"), KERNELS, ids=[name for name, *_ in KERNELS])
def test_kernels_compile_for_a_gpu(
    name: str,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Down to machine code, which needs no GPU: what the interpreter accepts may not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, function = name.split(".")
    kernel = getattr(importlib.import_module(f"rlmed.models.kernels.{module}"), function)
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in kernel.arg_names
    }
    assert {*types, *constants} <= {*signature}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(key),): value for key, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
