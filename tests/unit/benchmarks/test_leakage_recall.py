"""The benchmark counts a copy as found only by its own original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import leakage_recall
from tests.unit.rlmed.data.pictures import picture, save


def test_copies_are_counted_by_their_originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [save(tmp_path, f"{name}.png", picture(seed)) for seed, name in enumerate("abcdef")]
    twin = save(tmp_path, "twin.jpg", picture(0), quality=60)
    changes = {name: leakage_recall.CHANGES[name] for name in ("half size", "inverted")}
    monkeypatch.setattr(leakage_recall, "CHANGES", changes)
    scratch = tmp_path / "copies"
    scratch.mkdir()
    found = leakage_recall.measure(train[:3], [*train, twin], scratch)
    assert found["half size"] == {"copies": 3, "found": 3, "other_pairs": 1}
    assert found["inverted"] == {"copies": 3, "found": 0, "other_pairs": 0}
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("name", leakage_recall.CHANGES)
def test_every_change_gives_a_picture_and_changes_it(name: str) -> None:
    image = picture(3)
    changed = leakage_recall.CHANGES[name](image, np.random.default_rng(0))
    assert changed.mode == "RGB"
    assert changed.size != image.size or changed.tobytes() != image.tobytes()
