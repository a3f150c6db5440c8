"""How a worker of vLLM loads new weights; `VllmEngine` has all of them call these functions.

vLLM's layerwise reload repeats the processing after loading; layers without weights keep theirs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlmed.models.weights import WeightPart

# It warns about every layer without weights in a push, rotary embeddings included; the engine knows
# what is really missing. A filter, since vLLM resets its loggers' levels whenever an engine starts.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(
    lambda record: record.levelno >= logging.ERROR
)


def begin_load(worker: Any) -> set[str]:
    """Prepare for weights; return the names of all that this worker has."""
    names = {name for name, _ in worker.get_model().named_parameters()}  # tied ones once
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(worker.get_model())
    return names


def load(worker: Any, weights: WeightPart) -> set[str]:
    """Load some weights, copied, since an incomplete layer keeps them until it is whole.

    Returns:
        vLLM's names of what they went into.
    """
    with set_current_vllm_config(worker.vllm_config):
        tensors = ((name, tensor.clone()) for name, tensor in weights.tensors(worker.device))
        return set(worker.get_model().load_weights(tensors))


def end_load(worker: Any) -> None:
    """Process what has been loaded."""
    with set_current_vllm_config(worker.vllm_config):
        finalize_layerwise_reload(worker.get_model(), worker.model_config)
    repack_projections(worker)
    torch.accelerator.synchronize()


def repack_projections(worker: Any) -> None:
    """Refresh the packed copies of vocabulary projections on a CPU.

    A projection tied to the embeddings receives no weights, so the layerwise reload leaves its copy
    stale.
    """
    if worker.device.type == "cpu":
        for layer in worker.get_model().modules():
            if isinstance(layer, VocabParallelEmbedding) and "cpu_linear" in vars(layer):
                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
