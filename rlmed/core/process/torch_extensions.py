"""Workaround for torchvision and torchaudio binaries that don't match the installed torch.

The package registry builds both for CUDA. With a CPU build of torch their libraries don't load, so
importing them fails, and transformers with them. rlmed needs no compiled operator of either:
declaring the two operators that torchvision registers on import makes the rest of it work;
torchaudio is hidden.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

_DECLARED: list[object] = []
"""Keeps the library objects alive, and with them their declarations."""


def disable_broken_extensions() -> None:
    """Make `import transformers` work beside such binaries; call before importing it or vLLM.

    Idempotent, and a no-op where they match torch or are not installed.
    """
    if _is_broken("torchvision", "_C.*"):
        _declare_operators()
    if _is_broken("torchaudio", "lib/_torchaudio.*"):
        # without this entry, transformers would find the package and fail to import it
        sys.modules["torchaudio"] = None  # type: ignore[assignment]


def _is_broken(package: str, pattern: str) -> bool:
    """Return True if a package is installed, not imported yet, and its library does not load."""
    if package in sys.modules or importlib.util.find_spec("torch") is None:
        return False
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return False
    libraries = [path for path in Path(spec.origin).parent.glob(pattern) if path.suffix in (".so", ".pyd", ".dylib")]
    if not libraries:
        return False
    torch = _torch()
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:
        return True
    return False


def _torch() -> Any:
    """Import torch lazily: importing this module must not require it."""
    return importlib.import_module("torch")


def _declare_operators() -> None:
    if _DECLARED:
        return
    library = _torch().library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
