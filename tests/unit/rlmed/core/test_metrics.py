import re
from pathlib import Path

import pytest

from rlmed.core.config.building import check_key
from rlmed.core.metrics import METRICS, find_metric
from rlmed.recording.progress import METRICS as SHOWN
from rlmed.recording.recorder import RunRecorder
from rlmed.report.plots import PANELS
from rollout.pool.metrics import PoolMetrics
from tests.root import ROOT


def test_names_of_rewards_modalities_and_stages_are_found() -> None:
    assert find_metric("kl") is METRICS["kl"]
    assert find_metric("reward/mean") is METRICS["reward/mean"]
    assert find_metric("reward/few_words") is METRICS["reward/*"]
    assert find_metric("reward_std/CT/MRI") is METRICS["reward_std/*"]


@pytest.mark.parametrize("name", ["loos", "groups/lernt", "reward"])
def test_a_metric_outside_of_the_table_cannot_be_recorded(name: str, tmp_path: Path) -> None:
    """So every integration test of a run checks that all its metrics are in it."""
    with RunRecorder(tmp_path) as recorder, pytest.raises(KeyError):
        recorder.record_step(1, {name: 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_each_metric_is_written_somewhere() -> None:
    files = [path for room in ("rlmed", "rollout", "learner", "rewards") for path in (ROOT / room).rglob("*.py")]
    code = "\n".join(path.read_text() for path in files if path != ROOT / "rlmed" / "core" / "metrics.py")
    missing = [name for name in METRICS if f'"{name.partition("*")[0]}' not in code]
    assert missing == []


def test_keys_in_the_table_exist() -> None:
    keys = [key for metric in METRICS.values() for key in re.findall(r"[a-z]+\.[a-z_.]+", metric.meaning)]
    assert "rollout.max_tokens" in keys
    for key in keys:
        check_key(key)


def test_metrics_of_a_pool_are_in_the_table() -> None:
    """The runs in `make test-fast` have no pool of workers."""
    names = PoolMetrics(now=0.0).read([], now=1.0)
    assert set(names) == {name for name in METRICS if name.startswith("rollout/") and "push" not in name}


def test_display_and_report_show_metrics_of_the_table() -> None:
    for name in [*SHOWN, *(name for panel in PANELS for name in panel.metrics)]:
        assert "*" not in name
        find_metric(name)
