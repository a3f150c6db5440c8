"""The learner processes of `test_fsdp.py` and their jobs; a module that they can import."""

from __future__ import annotations

import tests.prepared  # noqa: F401

# isort: split

import multiprocessing
import os
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner import checkpoint as learner_checkpoint
from learner.distributed import FSDP, free_init_method, init_distributed
from learner.learner import PolicyLearner
from rlmed.core.types import TrainGroup
from rlmed.models.adapters import add_adapters
from rlmed.models.policy import load_policy
from tests.configs import learner_config, lora_config, loss_config
from tests.rounding import smooth_updates

COLLECTIVE_S = 30.0
ANSWER_S = 60.0
LR = 3e-4


@dataclass
class Job:
    """Learn from some batches."""

    base: Path
    batches: list[list[TrainGroup]]
    start: Path | None = None
    """A checkpoint to go on from."""
    save: Path | None = None
    """An existing folder for a checkpoint at the end."""
    room: bool = True
    """Whether the host's memory can hold copies of what is saved."""
    after: list[list[TrainGroup]] = field(default_factory=list)
    """Batches to learn from while the checkpoint is written."""
    dtype: str = "float32"
    device: str = "cpu"
    loss: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    """Adapters to train, see `tests.configs.lora_config`; None: the weights."""
    spoil: int | None = None
    """Of this batch, make the gradient infinite on the last rank alone."""


@dataclass
class Result:
    """What came of it on one rank."""

    metrics: list[dict[str, float]]
    reports: list[str]
    version: int
    names: list[str]
    weights: dict[str, Tensor]
    """Empty but on the first rank."""
    state: Any
    """The optimizer's, whole; its tensors are None but on the first rank."""


def do(job: Job, parallelism: FSDP | None = None, *, last: bool = True) -> Result:
    """Load, learn, save; `last` is True on the last rank."""
    folder = job.base if job.lora else job.start or job.base
    policy = load_policy(folder, dtype=job.dtype, device=job.device)
    if job.lora:
        policy = add_adapters(policy, lora_config(**job.lora), base=str(job.base), seed=0)
        assert policy.adapters
        if job.start:
            policy.adapters.load(job.start)
    loss = loss_config(**job.loss)
    reference = None
    if loss.kl_coef and not job.lora:
        reference = load_policy(job.base, dtype=job.dtype, device=job.device)
        reference.model.requires_grad_(False)
    reports: list[str] = []
    learner = PolicyLearner(
        policy,
        reference,
        loss,
        learner_config(**{"lr": LR, "lr_schedule": "constant", **job.config}),
        total_steps=20,
        max_tokens=32,
        temperature=0.9,
        on_bad_step=lambda _, reason: reports.append(reason),
        parallelism=parallelism,
    )
    smooth_updates(learner.optimizer)
    if job.start:
        learner.load(job.start)
    metrics = []
    for number, batch in enumerate(job.batches):
        hook = None
        if last and job.spoil == number:
            hook = policy.model.get_decoder().layers[0].mlp.register_full_backward_hook(_infinite)
        metrics.append(step(learner, batch))
        if hook:
            hook.remove()
    if job.save:
        try:
            save(learner, job)
        except OSError as error:
            reports.append(str(error))
    weights = {name: whole.clone() for name, whole in learner.full_weights()}
    state = whole_state(learner.optimizer.state_dict(), first=not parallelism or parallelism.first)
    names = [name for name, _ in policy.model.named_parameters()]
    return Result(metrics, reports, learner.policy_version, names, weights, state)


def whole_state(value: Any, *, first: bool) -> Any:
    """Gather all tensors in dicts and lists, one after the other; None but on the `first`."""
    if isinstance(value, dict):
        return {key: whole_state(entry, first=first) for key, entry in value.items()}
    if isinstance(value, list):
        return [whole_state(entry, first=first) for entry in value]
    if isinstance(value, Tensor):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.detach().clone().cpu() if first else None
    return value


def step(learner: PolicyLearner, batch: list[TrainGroup]) -> dict[str, float]:
    """Learn from a batch; of several ranks, each from its share."""
    ranks = learner._parallelism
    if isinstance(ranks, FSDP):
        return learner.learn(learner.split(batch, ranks.size)[ranks.rank])
    return learner.step(batch)


def save(learner: PolicyLearner, job: Job) -> None:
    """Begin to save, go on learning, and write in another thread meanwhile, as a run does."""
    assert job.save
    learner_checkpoint.ROOM = 2 if job.room else 10**9
    write = learner.save(job.save)
    with ThreadPoolExecutor(1) as aside:
        written = aside.submit(write)
        for batch in job.after:
            step(learner, batch)
        written.result()


def _infinite(_: Any, gradients: tuple[Tensor, ...], __: Any) -> tuple[Tensor, ...]:
    return tuple(gradient * torch.inf for gradient in gradients)


def serve(rank: int, size: int, init_method: str, device: str, test: Connection) -> None:
    """Do jobs until None arrives or the test is gone; a failing job's answer is its error text."""
    torch.set_num_threads(1)
    if device == "cuda":  # as Ray does: a rank sees its own GPU only, and calls it "cuda"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(size)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank]
    parallelism = init_distributed(rank, size, init_method, device=device, timeout_s=COLLECTIVE_S)
    try:
        while (job := test.recv()) is not None:
            job.device = device
            try:
                test.send(do(job, parallelism, last=rank == size - 1))
            except Exception:
                test.send(traceback.format_exc())
    except EOFError:
        pass
    parallelism.leave()


class Processes:
    """The ranks, started once.

    No call waits longer than its limit, and `close` leaves no process behind.
    """

    def __init__(self, count: int, device: str = "cpu") -> None:
        context = multiprocessing.get_context("spawn")
        init_method = free_init_method()
        self._ranks, self._processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            arguments = (rank, count, init_method, device, there)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._ranks.append(here)
            self._processes.append(process)

    def do(self, job: Job) -> list[Result]:
        """The job's result on each rank."""
        if not all(process.is_alive() for process in self._processes):
            pytest.fail("the ranks are gone since an earlier test")
        for rank in self._ranks:
            rank.send(job)
        try:
            results = [self._answer(number) for number in range(len(self._ranks))]
            errors = [result for result in results if isinstance(result, str)]
            assert not errors, "\n".join(errors)
        except BaseException:
            self.close()  # after an error the ranks may wait for each other
            raise
        return results

    def _answer(self, number: int) -> Any:
        if not self._ranks[number].poll(ANSWER_S):
            pytest.fail(f"rank {number} did not answer within {ANSWER_S} s")
        try:
            return self._ranks[number].recv()
        except EOFError:
            return f"rank {number} died"

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
