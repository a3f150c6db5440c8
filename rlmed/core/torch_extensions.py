"""A cure for torchvision and torchaudio whose compiled parts do not fit the installed torch.

The package registry builds both for CUDA. Beside a CPU build of torch their libraries do not load, then not even importing
them works, and with them nothing in transformers. rlmed needs no compiled operator of either: two that torchvision wants to
describe while it is imported are declared, and the rest of it works; torchaudio is hidden.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

_DECLARED: list[object] = []
"""Keeps the declarations alive: they end with their library object."""


def cure_torch_extensions() -> tuple[str, ...]:
    """Make `import transformers` work in this process; call before transformers or vLLM is imported.

    Returns:
        Names of the packages that needed it: none where both are absent or fit.
    """
    cured = []
    if _is_broken("torchvision", "_C.*"):
        _declare_operators()
        cured.append("torchvision")
    if _is_broken("torchaudio", "lib/_torchaudio.*"):
        # without this entry, transformers would find the package and fail in importing it
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
        cured.append("torchaudio")
    return tuple(cured)


def _is_broken(package: str, pattern: str) -> bool:
    """True when a package is installed, not imported yet, and its library does not load."""
    if package in sys.modules:
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
    """Not imported at the top: whoever imports this module need not have torch."""
    return importlib.import_module("torch")


def _declare_operators() -> None:
    if _DECLARED:
        return
    torch = _torch()

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
