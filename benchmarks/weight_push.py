"""How long does a push of new weights take, stage by stage, on a machine without a GPU?

The learner's process copies its parameters into buckets and puts them into Ray's object store
(gather); a worker in another process fetches them (transfer, while its engine could go on
sampling), and its engine takes them (apply): checksums, copies, what vLLM packs anew, caches
dropped. Both engines are measured with the tiny model and with the geometry of Qwen2-VL-2B in
bfloat16 (4.4 GB), whose weights are random numbers in a folder that is written for the purpose.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import shutil
import statistics
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks.common import add_arguments, find_model, report, start, write_result
from rlmed.cluster.ray_session import worker_environment
from rlmed.core.weights import PushReport, StoredWeights
from rlmed.models.policy import load_policy
from rlmed.models.weights import make_buckets
from rollout.engine import Engine
from rollout.native.engine import NativeEngine
from rollout.pool.actor import RayWorker

GIB = 2**30
LIMIT_S = 1800.0


def write_2b(tiny: Path, folder: Path) -> None:
    """A folder of Qwen2-VL-2B-Instruct's geometry: random weights, the tiny model's tokenizer."""
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    small = json.loads((tiny / "config.json").read_text())
    tokens = {name: value for name, value in small.items() if name.endswith("_token_id") and value is not None}
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": small["text_config"].get("bos_token_id"),
            "eos_token_id": small["text_config"].get("eos_token_id"),
        },
        vision_config={"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536},
        tie_word_embeddings=True,
        **tokens,
    )
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(folder)


def build_engine(kind: str, folder: Path, dtype: str, threads: int) -> Engine:
    """The engine of a worker."""
    torch.set_num_threads(threads)
    if kind == "native":
        return NativeEngine(load_policy(folder, dtype=dtype), lambda ids: "")
    from rollout.vllm_backend.engine import VllmEngine
    from rollout.vllm_backend.settings import VllmSettings

    limits = VllmSettings(dtype=dtype, max_completions=4, max_prompt_tokens=512, max_tokens=64, enforce_eager=True)
    return VllmEngine(folder, limits)


@ray.remote(num_cpus=0)
class Source:
    """Stands where the learner's rank 0 does: holds the parameters and stores them."""

    def __init__(self, folder: Path, dtype: str, threads: int) -> None:
        """Load the model."""
        torch.set_num_threads(threads)
        self._model = load_policy(folder, dtype=dtype).model

    def store_weights(self, version: int) -> tuple[StoredWeights, float, int]:
        """One push's first half: the weights, seconds and bytes."""
        start, size, buckets = time.perf_counter(), 0, []
        for bucket in make_buckets(self._model.named_parameters()):
            buckets.append(ray.put(bucket))
            size += bucket.data.nbytes
        return StoredWeights(version, buckets), time.perf_counter() - start, size


def push(source: Any, worker: RayWorker, version: int) -> dict[str, float]:
    """One push; seconds by stage."""
    begin = time.perf_counter()
    stored, gather_s, size = ray.get(source.store_weights.remote(version), timeout=LIMIT_S)
    applied: Future[PushReport] = worker.update_weights(stored)
    result = applied.result(timeout=LIMIT_S)
    return {
        "gather_s": gather_s,
        "transfer_s": result.fetch_s,
        "apply_s": result.apply_s,
        "whole_s": time.perf_counter() - begin,
        "bytes": float(size),
    }


def measure(folder: Path, kind: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Several pushes to a worker with the named engine."""
    source = Source.remote(folder, dtype, arguments.threads)
    worker = RayWorker(f"{kind} worker", functools.partial(build_engine, kind, folder, dtype, arguments.threads))
    try:
        worker.status().result(timeout=LIMIT_S)
        # the first push is not counted: it makes the store's memory
        runs = [push(source, worker, version) for version in range(arguments.rounds + 1)][1:]
    finally:
        worker.kill()
        ray.kill(source)
    gc.collect()
    medians = {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
    size = medians.pop("bytes")
    return {"engine": kind, "dtype": dtype, "gib": round(size / GIB, 3), **medians, "runs": runs}


def main() -> None:
    """Measure and write `weight_push.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, rounds=3)
    parser.add_argument("--engines", nargs="+", choices=("native", "vllm"), default=["native", "vllm"])
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "2b"), default=["tiny", "2b"])
    arguments = parser.parse_args()
    start(arguments)
    results = []
    with tempfile.TemporaryDirectory(prefix="wp-") as scratch:
        tiny, _ = find_model(arguments.model, Path(scratch))
        for size in arguments.sizes:
            folder, dtype = (tiny, "float32") if size == "tiny" else (Path(scratch) / "2b", "bfloat16")
            if size == "2b":
                write_2b(tiny, folder)
            for kind in arguments.engines:
                # a store of its own for each, so that no earlier push takes room in it
                ray.init(
                    address="local",
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=int((0.5 if size == "tiny" else 10) * GIB),
                    _temp_dir=f"{scratch}/r-{size}-{kind}",
                    runtime_env=worker_environment({}, here=True),
                )
                try:
                    result = {"model": size, **measure(folder, kind, dtype, arguments)}
                finally:
                    ray.shutdown()
                report(json.dumps({name: value for name, value in result.items() if name != "runs"}))
                results.append(result)
    setting = {"rounds": arguments.rounds, "threads": arguments.threads}
    report(f"written to {write_result('weight_push', {'setting': setting, 'pushes': results}, arguments.out)}")


if __name__ == "__main__":
    main()
