"""Where Triton's kernels are tested: on a CUDA device, or anywhere with TRITON_INTERPRET=1.

Importing this skips a module's tests where Triton is not installed.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no CUDA device"),
]
pytest.importorskip("triton", reason="triton is not installed")
