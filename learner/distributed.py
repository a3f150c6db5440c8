"""How the ranks of a learner share a step: one rank alone, or several that hold a shard of the policy each (FSDP2).

`PolicyLearner` asks both the same questions and does not know which it has. Every rank is given the whole batch, so who
takes which part, how many micro-batches there are and what the loss is divided by are known to all without a message. What
is exchanged: shards before use, gradients (summed, never averaged), one vector of numbers an update, and the norm.

A collective is a call that all ranks must make, in the same order: `step`, `full_weights`, `save` of a learner are.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from learner.metrics import LossMetrics, merge_metrics
from learner.packing import PackedBatch, PackItem, frozen_logprobs, packed_logprobs, share_by_tokens, split_by_tokens
from rlmed.models.policy import Policy


class RowScorer(Protocol):
    """Log-probabilities of packed rows under one policy."""

    def logprobs(self, batch: PackedBatch, temperature: float, *, images: bool) -> tuple[Tensor, Tensor]:
        """float32 [M] log-probabilities of the targets (differentiable) and [M] entropies.

        `images` says whether any row of this update, on any rank, has an image.
        """
        ...

    def frozen_logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        """The log-probabilities alone, without gradient."""
        ...


class Ranks(Protocol):
    """What a learner needs to know of its fellows."""

    first: bool
    """True on the one rank that writes files and is given whole tensors."""

    def scorer(self, policy: Policy) -> RowScorer:
        """How to run the policy, which is sharded in place where there is anybody to share it with."""
        ...

    def micro_batches(self, items: Sequence[PackItem], token_budget: int) -> list[list[PackItem]]:
        """This rank's part of `items`, in as many micro-batches as every other rank has."""
        ...

    def merge(self, loss: float, metrics: LossMetrics) -> tuple[float, LossMetrics]:
        """Loss and metrics of an update from those of each rank; a loss that is broken on one is broken on all."""
        ...

    def whole(self, value: Any, *, on_device: bool = False) -> Any:
        """A tensor, or each of a nest of dicts and lists, whole. Of several ranks the first has it, others None.

        It is on the CPU, or with `on_device` where it was; with one rank where it was in any case.
        """
        ...

    def replicated(self, value: Tensor) -> Tensor:
        """A number computed from sharded tensors, such as a norm, on every rank."""
        ...

    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        """A copy of this rank's share of a whole tensor, laid out and placed as `like`."""
        ...


class OneRank:
    """See `Ranks`: nobody to share with, so nothing is sharded, copied or sent."""

    first = True

    def scorer(self, policy: Policy) -> RowScorer:
        """See `Ranks.scorer`."""
        return _WholeScorer(policy)

    def micro_batches(self, items: Sequence[PackItem], token_budget: int) -> list[list[PackItem]]:
        """See `Ranks.micro_batches`."""
        return split_by_tokens(items, token_budget)

    def merge(self, loss: float, metrics: LossMetrics) -> tuple[float, LossMetrics]:
        """See `Ranks.merge`."""
        return loss, metrics

    def whole(self, value: Any, *, on_device: bool = False) -> Any:
        """See `Ranks.whole`."""
        return value

    def replicated(self, value: Tensor) -> Tensor:
        """See `Ranks.replicated`."""
        return value

    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        """See `Ranks.share`."""
        return whole.to(like.device, copy=True)


class ShardedRanks:
    """See `Ranks`: this process is one of several that were joined by `join`."""

    def __init__(self, device: torch.device) -> None:
        """Use the process group that this process is in, for tensors on `device`."""
        group = dist.group.WORLD
        assert group is not None, "join first"
        self.rank, self.size, self.first = group.rank(), group.size(), group.rank() == 0
        self._device, self._mesh = device, DeviceMesh.from_group(group, device.type)

    def scorer(self, policy: Policy) -> RowScorer:
        """See `Ranks.scorer`; the policy must be on this rank's device, and equal on all ranks."""
        return _ShardedScorer(policy, self._mesh)

    def micro_batches(self, items: Sequence[PackItem], token_budget: int) -> list[list[PackItem]]:
        """See `Ranks.micro_batches`; a rank with fewer than the others computes a filler that is not trained."""
        shares = [split_by_tokens(part, token_budget) for part in share_by_tokens(items, self.size)]
        count = max(map(len, shares))
        shortest = min(items, key=lambda item: item.tokens)
        filler = PackItem(shortest.prompt, (replace(shortest.sequences[0], loss_mask=False),))
        own = shares[self.rank]
        return own + [[filler]] * (count - len(own))

    def merge(self, loss: float, metrics: LossMetrics) -> tuple[float, LossMetrics]:
        """See `Ranks.merge`.

        Each rank reduces by itself what all have sent: NaN would not survive a collective maximum, and all ranks must come
        to the same decision bit by bit.
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

    def whole(self, value: Any, *, on_device: bool = False) -> Any:
        """See `Ranks.whole`; one tensor after the other, so that no rank but the first holds more than one of them."""
        if isinstance(value, dict):
            return {key: self.whole(entry, on_device=on_device) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.whole(entry, on_device=on_device) for entry in value]
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if isinstance(value, Tensor):
            if not self.first:
                return None
            return value.detach() if on_device else value.detach().cpu()
        return value

    def replicated(self, value: Tensor) -> Tensor:
        """See `Ranks.replicated`."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def share(self, whole: Tensor, like: Tensor) -> Tensor:
        """See `Ranks.share`; each rank reads the whole tensor itself, so nothing is sent."""
        if not isinstance(like, DTensor) or whole.ndim == 0:
            return whole.to(like.device, copy=True)
        placed = distribute_tensor(whole.to(self._device), like.device_mesh, like.placements, src_data_rank=None)
        return placed.clone()

    def leave(self) -> None:
        """Leave the process group; no collective is possible afterwards."""
        dist.destroy_process_group()


def join(
    rank: int, size: int, meeting_point: str, *, device: str | torch.device = "cpu", timeout_s: float = 1800.0
) -> ShardedRanks:
    """Meet the other ranks; returns when all are there.

    Args:
        rank: of this process, from 0.
        size: number of ranks.
        meeting_point: "tcp://HOST:PORT", where rank 0 listens (see `free_meeting_point`), or "file:///PATH" of a file that
            does not exist yet, on a disk that all share.
        device: "cpu" (gloo) or "cuda", "cuda:N" (NCCL); every rank needs a GPU of its own.
        timeout_s: after it a collective that a rank does not take part in is an error (gloo) or ends the process (NCCL).

    Raises:
        RuntimeError: torch's, when the others do not come in time.
    """
    device = torch.device(device)
    if device.type == "cuda":
        # torch wants a number here; Ray shows each rank its own GPUs, so it calls its first one just "cuda"
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=meeting_point,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    return ShardedRanks(device)


def free_meeting_point(host: str = "127.0.0.1") -> str:
    """A meeting point on this machine, whose address is `host`, for `join` of a rank 0 that runs here."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


class _WholeScorer:
    """See `RowScorer`."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logprobs(self, batch: PackedBatch, temperature: float, *, images: bool) -> tuple[Tensor, Tensor]:
        return packed_logprobs(self._policy, batch, temperature)

    def frozen_logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        return frozen_logprobs(self._policy, batch, temperature)


class _ShardedScorer:
    """See `RowScorer`; all ranks call it together."""

    def __init__(self, policy: Policy, mesh: DeviceMesh) -> None:
        """Shard the policy: each decoder layer is gathered by itself, everything else is one unit.

        The vision tower cannot be a unit of its own: a rank whose row has no image does not run it, and would not take part
        in gathering it.
        """
        self._root = _Root(policy)
        # bfloat16 gradients are summed over ranks in float32; a layer's inputs keep their dtype
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in (*policy.model.get_decoder().layers, self._root):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                # the loss is already divided by what all ranks have, so gradients add up; gloo knows sums only
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def logprobs(self, batch: PackedBatch, temperature: float, *, images: bool) -> tuple[Tensor, Tensor]:
        return self._root(batch, temperature, images)

    @torch.no_grad()
    def frozen_logprobs(self, batch: PackedBatch, temperature: float) -> Tensor:
        return self._root(batch, temperature, None)


class _Root(nn.Module):
    """The policy from tokens to log-probabilities as one module, whose parameters are whole while its forward runs."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = policy.model
        self._policy, self._joins = policy, False
        policy.model.get_input_embeddings().register_forward_hook(self._join)

    def forward(self, batch: PackedBatch, temperature: float, images: bool | None) -> Any:
        """As `RowScorer.logprobs`, or where `images` is None as `RowScorer.frozen_logprobs`."""
        if images is None:
            return frozen_logprobs(self._policy, batch, temperature)
        # where other ranks have a gradient of the vision tower, this one needs one too
        self._joins = images and not batch.image_inputs
        try:
            return packed_logprobs(self._policy, batch, temperature)
        finally:
            self._joins = False

    def _join(self, _: nn.Module, __: Any, embeddings: Tensor) -> Tensor:
        """Put the trained parameters that a row without image does not use into the graph, as an image would.

        At the embeddings and not at the end: with a frozen decoder its layers then still have a backward pass, in which
        the ranks gather them together.
        """
        if not self._joins:
            return embeddings
        part_of = self._policy.family.part_of
        idle = (
            parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and part_of(name) != "language_model"
        )
        return _Join.apply(embeddings, *idle)


class _Join(torch.autograd.Function):
    """`values` unchanged, with `parameters` in its graph: their gradient is zero, and not missing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
