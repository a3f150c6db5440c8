"""How a rank joins the others; what ranks compute together is in tests/numerics/test_fsdp.py."""

from __future__ import annotations

import pytest
import torch
from torch.cuda._utils import _get_device_index

from learner import distributed


@pytest.mark.parametrize(("asked", "expected"), [("cuda", 3), ("cuda:1", 1)])
def test_a_rank_takes_its_gpu_by_number(asked, expected, monkeypatch):
    """Ray shows a rank its own GPUs as "cuda"; torch needs a number to make it the current one."""
    chosen, joined = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_: joined.append(backend))
    monkeypatch.setattr(distributed, "FSDP", lambda device, _: device)
    assert distributed.init_distributed(0, 2, "tcp://127.0.0.1:1", device=asked) == torch.device("cuda", expected)
    assert (chosen, joined) == ([expected], ["nccl"])
