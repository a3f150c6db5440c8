"""Checkpoints of a learner: each rank writes its share, while the next steps run.

| in the folder | holds |
| --- | --- |
| `model.safetensors`; of N ranks `model-0000I-of-0000N.safetensors` and an index | weights, a Hugging Face model |
| `adapter_model.safetensors` instead, if adapters are trained | the adapters, an adapter of peft |
| `optimizer/` | float32 masters and AdamW's moments, each rank's shards, by torch.distributed.checkpoint |
| `optimizer/foreign-0.pt` | moments of a library's own type, which have one rank (`learner.moments=8bit`) |
| `optimizer/numbers.json` | everything else of the optimizer |

No rank ever holds more than its share and one whole parameter: parameters are gathered one by one,
and each is kept by the rank whose file it belongs to. A run may resume on another number of ranks:
each reads the parts that make up its new shards.

`begin_save` copies a rank's share to the host's memory; the function that it returns writes the
copy, in any thread. This pays on a CPU too, since most of the time goes into writing and syncing,
but it doubles what the learner holds for a while. Where the host has less than `ROOM` times the
copies' size to spare, `begin_save` therefore writes at once, without a copy.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from learner.distributed import Parallelism
from learner.moments import local_of
from learner.optimizer import Optimizer
from rlmed.core.process.threads import available_memory
from rlmed.models.folder.adapter import WEIGHTS_FILE
from rlmed.models.policy import Policy
from rlmed.models.saving import StoredWeight, file_name, save_settings, share_weights, write_index, write_weights

OPTIMIZER_FOLDER = "optimizer"
NUMBERS_FILE = "numbers.json"
FOREIGN_FILE = "foreign-0.pt"
STATE = "state"
"""Prefix of the tensors' names in `OPTIMIZER_FOLDER`."""
EARLIER_FILE = "optimizer.pt"
"""The optimizer's whole state in a checkpoint of an earlier version."""
ROOM = 2
"""Free host memory that a copy needs, as a multiple of its size, beside the next step's."""


def begin_save(policy: Policy, optimizer: Optimizer, parallelism: Parallelism, folder: Path) -> Callable[[], None]:
    """Secure the learner's present state; return the function that writes it into `folder`.

    Both are collective: every rank calls them, with a folder on a disk that all share.
    """
    names = None
    try:
        if parallelism.first:  # transformers saves there only
            names = _save_settings(policy, folder)
    finally:  # the other ranks wait for the first, even if it has failed
        names = parallelism.from_first(names)
    if names is None:
        return lambda: None
    shares = _share(policy, names, parallelism.size)
    adapters = policy.adapters is not None
    state, weights = optimizer.state_dict(), _gather_own(policy, shares, parallelism)
    size = sum(weight.nbytes for weight in shares[parallelism.rank])
    size += sum(local_of(value).nbytes for value in _flat(state).values() if isinstance(value, Tensor))
    if parallelism.everywhere(_has_room(size, _step_bytes(), ranks=parallelism.size)):
        copies = iter([_host_copy(weight) for weight in weights])
        return partial(_write, folder, shares, parallelism, _host_copy(state), copies, adapters=adapters)
    _write(folder, shares, parallelism, state, weights, adapters=adapters)
    return lambda: None


def _save_settings(policy: Policy, folder: Path) -> dict[str, str]:
    """Write settings; return the name in weight files of each parameter that goes there."""
    return save_settings(policy.model, folder) if policy.adapters is None else policy.adapters.save_settings(folder)


def _share(policy: Policy, names: Mapping[str, str], ranks: int) -> list[list[StoredWeight]]:
    """Divide what goes into weight files among the ranks; adapters are one rank's."""
    stored = [(name, parameter) for name, parameter in policy.model.named_parameters() if name in names]
    if policy.adapters is None:
        return share_weights(stored, names, ranks)
    return [*share_weights(stored, names, 1), *[[]] * (ranks - 1)]


def _has_room(size: int, step_bytes: int, *, ranks: int) -> bool:
    """Return whether the host can hold copies of `size` bytes while a step takes `step_bytes`.

    Both are of one of the `ranks`, which are taken to be all on this host.
    """
    free = available_memory(processes=ranks)
    return free is not None and free >= ranks * (ROOM * size + step_bytes)


def _step_bytes() -> int:
    """Return what earlier steps took of the host's memory for a while; 0 without Linux's /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = {
        name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    return sizes["VmHWM"] - sizes["VmRSS"]


def _host_copy(value: Any) -> Any:
    """Copy a tensor, or all in nested dicts, into the host's memory."""
    if isinstance(value, dict):
        return {key: _host_copy(entry) for key, entry in value.items()}
    if _is_foreign(value):  # what it calls a copy need not be one
        own: Any = value  # torch leaves the protocol of such types untyped
        names, context = own.__tensor_flatten__()
        inner = {name: _host_copy(getattr(own, name)) for name in names}
        return own.__tensor_unflatten__(inner, context, own.shape, own.stride())
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _gather_own(policy: Policy, shares: Sequence[Sequence[StoredWeight]], parallelism: Parallelism) -> Iterator[Tensor]:
    """Yield the whole parameters of this rank's file; collective, all ranks must exhaust it."""
    parameters = dict(policy.model.named_parameters())
    for turn in zip_longest(*shares):
        for rank, weight in enumerate(turn):
            if weight is not None:
                parameter = parameters[weight.parameter].detach()
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                if rank == parallelism.rank:
                    yield whole
                del whole


def _write(
    folder: Path,
    shares: Sequence[Sequence[StoredWeight]],
    parallelism: Parallelism,
    state: Mapping[str, Any],
    weights: Iterator[Tensor],
    *,
    adapters: bool,
) -> None:
    written = False
    try:
        if adapters:
            if parallelism.first:
                write_weights(folder / WEIGHTS_FILE, shares[0], weights)
        else:
            write_weights(folder / file_name(parallelism.rank, parallelism.size), shares[parallelism.rank], weights)
            if parallelism.first and parallelism.size > 1:
                write_index(folder, shares)
        written = True
    finally:  # the other ranks wait for this one, even if it has failed
        for _ in weights:
            pass
        whole = parallelism.everywhere(written)
    if whole:  # else the failed rank says why, and the folder is about to be removed
        write_optimizer(state, parallelism, folder)


def write_optimizer(state: Mapping[str, Any], parallelism: Parallelism, folder: Path) -> None:
    """Write `Optimizer.state_dict()`, of which each rank has its shards, into `folder`; collective.

    Raises:
        OSError: if a rank cannot write.
    """
    own, values = folder / OPTIMIZER_FOLDER, _flat(state)
    foreign = {name: value for name, value in values.items() if _is_foreign(value)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor) and name not in foreign}
    # without `per_thread_copy_ahead` it leaves the default GPU alone, which may not be ours
    writer = FileSystemWriter(own, per_thread_copy_ahead=0)
    _ignore_advice()
    try:
        save({STATE: tensors}, storage_writer=writer, process_group=parallelism.files, no_dist=parallelism.size == 1)
    except CheckpointException as error:  # torch's is no Exception
        raise _cause(error) from error
    # last, since the other ranks wait for none of it
    if foreign:
        torch.save(foreign, own / FOREIGN_FILE)
    if parallelism.first:
        facts = {key: value for key, value in state.items() if key not in ("adamw", "masters")}
        numbers = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        facts |= {"masters": list(state["masters"]), "numbers": numbers}
        (own / NUMBERS_FILE).write_text(json.dumps(facts, indent=1))


def read_optimizer(optimizer: Optimizer, parallelism: Parallelism, folder: Path) -> None:
    """Resume from what any number of ranks, or an earlier version, wrote into `folder`.

    Raises:
        ValueError: if the state belongs to other parameters, or has other moments.
    """
    if (folder / EARLIER_FILE).is_file():
        _read_earlier(optimizer, parallelism, folder / EARLIER_FILE)
        return
    own = folder / OPTIMIZER_FOLDER
    facts = json.loads((own / NUMBERS_FILE).read_text())
    optimizer.check(facts)
    reader = FileSystemReader(own)
    masters = optimizer.masters
    tensors: dict[str, Tensor] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        key = key.removeprefix(f"{STATE}.")
        name, _, kind = key.partition("/")
        if kind == "master":
            tensors[key] = masters[name]
        elif stored.size == masters[name].shape:
            tensors[key] = torch.empty_like(masters[name], dtype=stored.properties.dtype, requires_grad=False)
        else:
            tensors[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
    _ignore_advice()
    try:
        load({STATE: tensors}, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from error
    entries = _nested(tensors | facts["numbers"] | _read_foreign(own, masters))
    state = {i: entries[name] for i, name in enumerate(facts["parameters"]) if name in entries}
    kept = {name: entry.pop("master") for name, entry in entries.items() if "master" in entry}
    groups = optimizer.state_dict()["adamw"]["param_groups"]
    adamw = {"state": {i: entry for i, entry in state.items() if entry}, "param_groups": groups}
    optimizer.load_state_dict({**facts, "masters": kept, "adamw": adamw})


def _read_earlier(optimizer: Optimizer, parallelism: Parallelism, path: Path) -> None:
    # memory-mapped: each rank reads its share, and none holds a full copy
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    optimizer.check(state)
    masters = optimizer.masters
    names = state["parameters"]
    state["masters"] = {name: parallelism.shard_like(whole, masters[name]) for name, whole in state["masters"].items()}
    state["adamw"]["state"] = {
        number: {key: parallelism.shard_like(value, masters[names[number]]) for key, value in entry.items()}
        for number, entry in state["adamw"]["state"].items()
    }
    optimizer.load_state_dict(state)


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return masters and AdamW's values of a state by NAME/master, NAME/exp_avg, ..."""
    entries: dict[str, Any] = {name: {"master": master} for name, master in state["masters"].items()}
    for number, entry in state["adamw"]["state"].items():
        name = state["parameters"][number]
        entries[name] = entries.get(name, {}) | entry
    return {f"{name}/{key}": value for name, entry in entries.items() for key, value in entry.items()}


def _nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {NAME: {"exp_avg": ...}} of {"NAME/exp_avg": ...}."""
    entries: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name, _, kind = key.partition("/")
        entries.setdefault(name, {})[kind] = value
    return entries


def _is_foreign(value: Any) -> bool:
    """Return whether it is of a library's own type, such as 8-bit moments."""
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor)


def _read_foreign(own: Path, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not (own / FOREIGN_FILE).is_file():
        return {}
    stored: dict[str, Tensor] = torch.load(own / FOREIGN_FILE, map_location="cpu", weights_only=True)
    return {key: value.to(masters[key.partition("/")[0]].device) for key, value in stored.items()}


def _ignore_advice() -> None:
    """Suppress torch's warning that a single process saves or loads alone."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def _cause(error: CheckpointException) -> BaseException:
    """Return what went wrong on the first rank that failed."""
    return next(iter(error.failures.values()))[0]
