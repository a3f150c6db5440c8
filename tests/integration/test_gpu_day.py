"""The benchmark of a GPU half hour: all of it runs without a GPU, and its models are what they
claim to be.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.gpu import setting
from benchmarks.gpu.decode import bytes_a_step
from benchmarks.gpu.learner import flops, make_items
from rlmed.models.attention import AttentionLayout, PackedLayout
from rlmed.models.policy import load_policy
from tests.integration.forked import Finished, run_forked

SMALL = setting.Geometry(
    hidden=256, layers=2, heads=4, kv_heads=2, intermediate=64, tied=True, vision_depth=1, vision_width=160
)
CPU = torch.device("cpu")
IN_ONE_PROCESS = ("decode", "learner", "loop")
"""Parts that are run without the process that each has otherwise: `kernels` needs the interpreter's
variable before triton is imported, and `probe` tells what a failed one does.
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, whose images become 512 tokens."""
    patch = pytest.MonkeyPatch()
    patch.setitem(setting.GEOMETRIES, "small", SMALL)
    with torch.random.fork_rng(devices=()):  # whatever other tests have drawn before
        torch.manual_seed(0)
        folder = setting.model_folder_of("small", tmp_path_factory.mktemp("gpu_day") / "small", CPU, 512)
    patch.undo()
    return folder


def test_geometries_are_those_of_the_published_models() -> None:
    """2.2 and 8.3 billion parameters, as Qwen2-VL's model cards say."""
    counts = {}
    for name in ("2b", "7b"):
        geometry = setting.GEOMETRIES[name]
        with torch.device("meta"):
            model = setting.Qwen2VLForConditionalGeneration(geometry.config({}))
        counts[name] = round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1)
    assert counts == {"2b": 2.2, "7b": 8.3}


def test_scores_are_as_large_as_in_real_models(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(small)
    prompts, _ = setting.make_prompts(small, 1, 600, tmp_path)
    scores = []

    @dataclasses.dataclass
    class Recorder:
        layout: PackedLayout

        def attend(
            self,
            layer: int,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            scale: float,
            window: int | None,
        ) -> torch.Tensor:
            scores.append(torch.einsum("nd,md->nm", query[:, 0], key[:, 0]) * scale)
            return self.layout.attend(layer, query, key, value, scale, window)

    layout: AttentionLayout = Recorder(PackedLayout.build([(600, ())]))
    with torch.no_grad():
        policy.hidden(
            torch.as_tensor(prompts[0].token_ids),
            policy.prompt_positions(prompts[0]),
            layout,
            policy.image_inputs(prompts[0]),
        )
    assert len(scores) == SMALL.layers
    for layer in scores:
        assert abs(float(layer.median()) - setting.COMMON_LOGIT) < 3


def test_an_image_becomes_as_many_visual_tokens_as_in_the_paper(small: Path, tmp_path: Path) -> None:
    prompts, _ = setting.make_prompts(small, 2, 640, tmp_path)
    policy = load_policy(small)
    for prompt in prompts:
        assert len(prompt.token_ids) == 640
        assert (prompt.token_ids == policy.model.config.image_token_id).sum() == 23**2


def test_bytes_and_operations_of_a_step(small: Path, tmp_path: Path) -> None:
    policy = load_policy(small)
    prompts, _ = setting.make_prompts(small, 2, 640, tmp_path)
    per_layer = 256 * 256 * 2 + 256 * 128 * 2 + 256 + 128 * 2 + 3 * 256 * 64 + 2 * 256
    language = 2 * per_layer + 256
    head = 151936 * 256
    cache = 2 * 2 * 2 * 64 * 2 * (640 + 8 * 5)
    assert bytes_a_step(policy, prompts, 8, 5) == 4 * (language + head + cache)
    items = make_items(prompts, 2, 4)
    tokens = sum(len(entry.completion.token_ids) for item in items for entry in item.sequences)
    assert flops(policy, items, vision=False) == 6.0 * (language * (2 * 640 + tokens - 4) + head * tokens)


def test_an_unknown_part_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--smoke", "warp"])
    with pytest.raises(SystemExit):
        gpu_day.main()
    assert "'warp'" in capsys.readouterr().err


def smoke(folder: Path, *arguments: str) -> Finished:
    """Run the benchmark; its results are in `folder`."""
    return run_forked(gpu_day.main, ["--smoke", *arguments], folder)


@pytest.mark.slow
def test_everything_runs_without_a_gpu(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for part in IN_ONE_PROCESS:  # importing torch takes longer than they
        done = smoke(folder, part, "--here", "--out", str(folder), "--scratch", str(folder))
        assert done.returncode == 0, done.output
    done = smoke(folder, *sorted(set(gpu_day.PARTS) - set(IN_ONE_PROCESS)), "--out", str(folder))
    assert done.returncode == 0, done.output
    results = {part: json.loads((folder / f"gpu_day_{part}.json").read_text()) for part in gpu_day.PARTS}
    assert all(result["smoke"] for result in results.values())
    assert results["decode"]["decode"][0]["tokens_per_s"] > 0
    assert max(row["relative_error"] for row in results["kernels"]["kernels"]) < 1e-3
    assert results["loop"]["runs"][0]["mismatch_kl"] < 1e-6


@pytest.mark.slow
def test_a_part_that_fails_is_reported(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.touch()
    done = smoke(tmp_path, "probe", "--out", str(taken))
    assert done.returncode == gpu_day.FAILED
    assert '"probe": "failed with status 1"' in done.output
