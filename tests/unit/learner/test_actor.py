"""What a learner rank's actor adds; Ray actors are in tests/integration/test_ray_workers.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


class Learner:
    """Stands in for a `PolicyLearner`; it notes what it is asked for among what the actor does."""

    policy_version = 3
    split = None

    def __init__(self, device, events):
        self.policy, self.events = SimpleNamespace(device=torch.device(device)), events

    def learn(self, share):
        self.events.append("learn")
        return {}

    def logprobs(self, questions):
        self.events.append("logprobs")
        return []

    def load(self, folder):
        self.events.append("load")


@pytest.mark.parametrize(
    ("shares", "device", "released"), [(True, "cuda:0", True), (False, "cuda:0", False), (True, "cpu", False)]
)
def test_memory_that_is_free_is_left_to_the_engine_on_the_same_gpu(shares, device, released, monkeypatch):
    """Torch keeps it otherwise, and an engine that wakes up finds none."""
    from learner.actor import LearnerActor

    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("release"))
    actor = LearnerActor.__ray_metadata__.modified_class()
    actor.build(lambda report, parallelism: Learner(device, events), 0, 1, None, device, 1.0, shares)
    calls = {"learn": [[]], "logprobs": [[]], "load": [Path("checkpoint")]}
    for name, arguments in calls.items():
        events.clear()
        getattr(actor, name)(*arguments)
        assert events == [name] + ["release"] * released
