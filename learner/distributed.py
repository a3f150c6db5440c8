"""Parallelism of a learner: a single process, or several ranks that shard the policy (FSDP2).

`PolicyLearner` uses both through one interface. The driver splits each batch (`learner.sharing`):
a rank receives its own micro-batches, as many as every other rank, with the loss denominators of
the whole. Ranks exchange shards before use, gradients (summed, never averaged), one vector of
numbers per update, and the norm.

A collective is a call that all ranks must make, in the same order: a learner's `step`,
`full_weights` and `save` are.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from learner.metrics import LossMetrics, merge_metrics
from learner.packing import PackedBatch, logprobs_no_grad, packed_logprobs
from rlmed.models.adapters import Adapters
from rlmed.models.merging import merge
from rlmed.models.policy import Policy

T = TypeVar("T")


class RowScorer(Protocol):
    """Computes log-probabilities of packed rows under one policy."""

    def logprobs(self, batch: PackedBatch, temperature: float, *, images: bool) -> tuple[Tensor, Tensor]:
        """Return float32 [M] log-probabilities of the targets (differentiable) and [M] entropies.

        `images` is True if any row of this update, on any rank, has an image.
        """
        ...

    def logprobs_no_grad(self, batch: PackedBatch, temperature: float) -> Tensor:
        """Return the log-probabilities only, without gradient."""
        ...


class Parallelism(Protocol):
    """How a learner's ranks share work."""

    rank: int
    """This process's, from 0."""
    size: int
    """Number of ranks."""
    first: bool
    """True on the one rank that receives full tensors."""
    files: dist.ProcessGroup | None
    """Group that connects the ranks' hosts, for checkpoints; None for a single process."""

    def scorer(self, policy: Policy) -> RowScorer:
        """Return a scorer for the policy, which several ranks shard in place."""
        ...

    def merge(self, loss: float, metrics: LossMetrics) -> tuple[float, LossMetrics]:
        """Merge loss and metrics of an update over ranks; one non-finite loss makes all so."""
        ...

    def gather_full(self, shard: Tensor, *, on_device: bool = False) -> Tensor | None:
        """Gather a tensor; ranks other than the first get None.

        It is on the CPU, or with `on_device` on its device; a single process leaves it where it is.
        """
        ...

    def everywhere(self, fact: bool) -> bool:
        """Return whether `fact` is true on all ranks; collective."""
        ...

    def from_first(self, value: T) -> T:
        """Return the first rank's `value`, small enough to be pickled; collective."""
        ...

    def full_scalar(self, value: Tensor) -> Tensor:
        """Reduce a number computed from sharded tensors, such as a norm, for every rank."""
        ...

    def shard_like(self, full: Tensor, like: Tensor) -> Tensor:
        """Copy this rank's shard of a full tensor, with layout and device of `like`."""
        ...


class SingleProcess:
    """`Parallelism` of one process: nothing is sharded, copied or sent."""

    rank, size, first = 0, 1, True
    files: dist.ProcessGroup | None = None

    def scorer(self, policy: Policy) -> RowScorer:
        """See `Parallelism.scorer`."""
        return _FullScorer(policy)

    def merge(self, loss: float, metrics: LossMetrics) -> tuple[float, LossMetrics]:
        """See `Parallelism.merge`."""
        return loss, metrics

    def gather_full(self, shard: Tensor, *, on_device: bool = False) -> Tensor | None:
        """See `Parallelism.gather_full`."""
        return shard

    def everywhere(self, fact: bool) -> bool:
        """See `Parallelism.everywhere`."""
        return fact

    def from_first(self, value: T) -> T:
        """See `Parallelism.from_first`."""
        return value

    def full_scalar(self, value: Tensor) -> Tensor:
        """See `Parallelism.full_scalar`."""
        return value

    def shard_like(self, full: Tensor, like: Tensor) -> Tensor:
        """See `Parallelism.shard_like`."""
        return full.to(like.device, copy=True)


class FSDP:
    """`Parallelism` of several processes connected by `init_distributed`."""

    def __init__(self, device: torch.device, timeout: timedelta) -> None:
        """Use this process's default group, for tensors on `device`; `timeout` as in that group."""
        group = dist.group.WORLD
        assert group is not None, "call init_distributed first"
        self.rank, self.size, self.first = group.rank(), group.size(), group.rank() == 0
        self._device, self._mesh = device, DeviceMesh.from_group(group, device.type)
        # of its own: a thread's collectives must not come between those of the main thread
        self.files: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=timeout)

    def scorer(self, policy: Policy) -> RowScorer:
        """See `Parallelism.scorer`; the policy must be on the rank's device, equal on all ranks."""
        return _ShardedScorer(policy, self._mesh)

    def merge(self, loss: float, metrics: LossMetrics) -> tuple[float, LossMetrics]:
        """See `Parallelism.merge`.

        Each rank reduces the gathered values itself: a collective maximum would lose NaN, and all
        ranks must reach the same decision bit for bit.
        """
        values = [value for metric in metrics.values() for value in vars(metric).values()]
        own = torch.stack([torch.tensor(loss, device=self._device), *values]).double()
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own)
        rows, parts = torch.stack(gathered).cpu(), []
        for row in rows:
            numbers = iter(row[1:])
            parts.append(
                {name: type(metric)(*(next(numbers) for _ in vars(metric))) for name, metric in metrics.items()}
            )
        return float(rows[:, 0].sum()), merge_metrics(parts)

    def gather_full(self, shard: Tensor, *, on_device: bool = False) -> Tensor | None:
        """See `Parallelism.gather_full`."""
        full = shard.full_tensor() if isinstance(shard, DTensor) else shard
        if not self.first:
            return None
        return full if on_device else full.cpu()

    def everywhere(self, fact: bool) -> bool:
        """See `Parallelism.everywhere`."""
        count = torch.tensor(int(fact))
        dist.all_reduce(count, group=self.files)
        return int(count) == self.size

    def from_first(self, value: T) -> T:
        """See `Parallelism.from_first`."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.files)
        return values[0]

    def full_scalar(self, value: Tensor) -> Tensor:
        """See `Parallelism.full_scalar`."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def shard_like(self, full: Tensor, like: Tensor) -> Tensor:
        """See `Parallelism.shard_like`; each rank has the full tensor, so nothing is sent."""
        if not isinstance(like, DTensor) or full.ndim == 0:
            return full.to(like.device, copy=True)
        placed = distribute_tensor(full.to(self._device), like.device_mesh, like.placements, src_data_rank=None)
        return placed.clone()

    def leave(self) -> None:
        """Destroy the process group; no collective works afterwards."""
        dist.destroy_process_group()


def full_weights(policy: Policy, parallelism: Parallelism, *, on_device: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield names and full tensors of all weights, as in the unsharded model without adapters.

    Those that have an adapter come merged with it. Collective: all ranks must exhaust it, and only
    the first receives tensors. Gathered ones are on the CPU, or with `on_device` on the policy's
    device.
    """
    for weight in policy.weights():
        full = parallelism.gather_full(weight.value.detach(), on_device=on_device)
        if weight.factors is not None:
            b, a = (parallelism.gather_full(factor.detach(), on_device=on_device) for factor in weight.factors)
            if full is not None and b is not None and a is not None:
                full = merge(weight.name, full, (b, a), weight.scale)
        if full is not None:
            yield weight.name, full


def init_distributed(
    rank: int, size: int, init_method: str, *, device: str | torch.device = "cpu", timeout_s: float = 1800.0
) -> FSDP:
    """Join the process group; return when all ranks have joined.

    Args:
        rank: this process's, from 0.
        size: number of ranks.
        init_method: "tcp://HOST:PORT", where rank 0 listens (see `free_init_method`), or
            "file:///PATH" of a file that does not exist yet, on a disk that all share.
        device: "cpu" (gloo) or "cuda", "cuda:N" (NCCL); every rank needs its own GPU.
        timeout_s: timeout after which an incomplete collective raises (gloo) or ends the process
            (NCCL).

    Raises:
        RuntimeError: torch's, if the other ranks do not join in time.
    """
    device = torch.device(device)
    if device.type == "cuda":
        # torch needs an index here; Ray shows each rank its own GPUs, so "cuda" means its first
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    return FSDP(device, timeout)


def free_init_method(host: str = "127.0.0.1") -> str:
    """Return an `init_method` with a free port, for a rank 0 on this machine (address `host`)."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


class _FullScorer:
    """See `RowScorer`."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logprobs(self, batch: PackedBatch, temperature: float, *, images: bool) -> tuple[Tensor, Tensor]:
        return packed_logprobs(self._policy, batch, temperature)

    def logprobs_no_grad(self, batch: PackedBatch, temperature: float) -> Tensor:
        return logprobs_no_grad(self._policy, batch, temperature)


class WithoutAdapters:
    """Scores rows under the reference of a policy with adapters: the same weights without them."""

    def __init__(self, scorer: RowScorer, adapters: Adapters) -> None:
        """Use the policy's `scorer`."""
        self._scorer, self._adapters = scorer, adapters

    def logprobs_no_grad(self, batch: PackedBatch, temperature: float) -> Tensor:
        """See `RowScorer.logprobs_no_grad`."""
        with self._adapters.off():
            return self._scorer.logprobs_no_grad(batch, temperature)


class _ShardedScorer:
    """`RowScorer` of a sharded policy; all ranks call it together."""

    def __init__(self, policy: Policy, mesh: DeviceMesh) -> None:
        """Shard the policy: one unit per decoder layer, and one for everything else.

        The vision tower cannot be its own unit: a rank whose row has no image does not run it, and
        would miss the gathering.
        """
        self._root = _Root(policy)
        # bfloat16 gradients are summed over ranks in float32; a layer's inputs keep their dtype
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in (*policy.model.get_decoder().layers, self._root):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                # the loss is already divided by global denominators, so gradients add up; gloo
                # supports only sums
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def logprobs(self, batch: PackedBatch, temperature: float, *, images: bool) -> tuple[Tensor, Tensor]:
        scored: tuple[Tensor, Tensor] = self._root(batch, temperature, images)
        return scored

    @torch.no_grad()
    def logprobs_no_grad(self, batch: PackedBatch, temperature: float) -> Tensor:
        scored: Tensor = self._root(batch, temperature, None)
        return scored


class _Root(nn.Module):
    """The policy, tokens to log-probabilities, as one module; its forward gathers parameters."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = policy.model
        self._policy, self._joins = policy, False
        policy.model.get_input_embeddings().register_forward_hook(self._join)

    def forward(self, batch: PackedBatch, temperature: float, images: bool | None) -> Any:
        """Run `RowScorer.logprobs`, or `RowScorer.logprobs_no_grad` if `images` is None."""
        if images is None:
            return logprobs_no_grad(self._policy, batch, temperature)
        # if other ranks have a gradient for the vision tower, this one needs one too
        self._joins = images and not batch.image_inputs
        try:
            return packed_logprobs(self._policy, batch, temperature)
        finally:
            self._joins = False

    def _join(self, _: nn.Module, __: Any, embeddings: Tensor) -> Tensor:
        """Add trained parameters that a row without images skips to the graph, as an image would.

        At the embeddings, not at the end: the layers of a frozen decoder then still have a backward
        pass, in which all ranks gather them.
        """
        if not self._joins:
            return embeddings
        part_of = self._policy.family.part_of
        idle = (
            parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and part_of(name) != "language_model"
        )
        return _joined(embeddings, *idle)


class _Join(torch.autograd.Function):
    """Returns `values` unchanged, with `parameters` in its graph: zero gradients, not missing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


_joined: Callable[..., Tensor] = _Join.apply  # torch leaves `apply` untyped
