"""Shared fixtures: small random models of every family, built offline once a session; prompts."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from rlmed.core.config.checks import PRODUCT_USES
from rlmed.core.plugins import FOLDER
from rlmed.core.process.collection import resume
from rlmed.core.types import (
    Completion,
    Example,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    SamplingParams,
    ScoredGroup,
    TrainGroup,
)
from rlmed.data.prompts import load_processor
from rlmed.models.cpu import products
from rlmed.models.cpu.products import has_onednn
from rlmed.models.loading import model_folder
from rlmed.models.policy import Policy, load_policy
from rlmed.models.tiny.build import build_tiny_text, build_tiny_vl
from tests.tiny_vision import TILE_FAMILIES, build_tiny_tiles

# one choice for all processes of the tests: those that compare runs bit by bit would else hang on a
# probe's noise
os.environ.setdefault("RLMED_ONEDNN", f"[{','.join(PRODUCT_USES[:2])}]" if has_onednn() else "[]")
products._Choice.uses = frozenset(os.environ["RLMED_ONEDNN"].strip("[]").split(",")) - {""}
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # the models are so small that threads only wait for each other

GRID_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VISION_FAMILIES = (*GRID_FAMILIES, *TILE_FAMILIES)
PLAIN_TOKENS = range(20, 300)
"""Ids of ordinary text; the control tokens are the last of the vocabulary."""
EXTRA_ENDS = (31, 32, 33, 34, 35, 36, 37, 38)
"""Ordinary tokens that also end a test model's completion, so random completions are ragged."""
OWN_PACKAGES = ("rlmed", "rollout", "learner", "rewards")
Grid = tuple[int, int]
FIVE: tuple[Grid, ...] = ((4, 6), (8, 4), (4, 4), (6, 4), (4, 8))
"""Patches of five images of a prompt."""


@pytest.hookimpl(tryfirst=True)  # pytest-xdist then reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist=loadgroup a file's tests share a process, and so do all that start Ray.

    Ray's processes have limits of time to answer in, so those of two tests must not run at once.
    One after the other they take longest, so they begin first, then other files with slow tests.
    """
    ranks = dict[str, int]()
    for item in items:
        ray = item.get_closest_marker("ray") is not None
        group = "ray" if ray else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
        slow = any(item.get_closest_marker(name) for name in ("slow", "vllm"))
        ranks[group] = min(ranks.get(group, 2), 0 if ray else 1 if slow else 2)
    items.sort(key=lambda item: ranks[item.get_closest_marker("xdist_group").args[0]])  # type: ignore[union-attr]


BELOW_RAY = 5
"""The niceness of tests without Ray while others run beside them."""
# Ray itself lets its workers give way to all others
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let Ray's tests, which take longest, have the processor before those that run beside them."""
    if "PYTEST_XDIST_WORKER" in os.environ and item.get_closest_marker("ray") is None:
        os.setpriority(os.PRIO_PROCESS, 0, max(BELOW_RAY, os.getpriority(os.PRIO_PROCESS, 0)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a pytest-xdist that forgets the groups."""
    if getattr(session.config.option, "loadgroup", False) and session.items:
        assert "@" in session.items[0].nodeid, "pytest-xdist has not grouped the tests: it does not fit this pytest"


@pytest.fixture(autouse=True)
def garbage_is_collected() -> Iterator[None]:
    """Resume what a command or a worker that a test began in this process has put off."""
    yield
    resume()


@pytest.fixture(autouse=True)
def own_folder_goes_with_the_test() -> Iterator[None]:
    """Forget the folder of `--config-dir` of a command that a test began in this process."""
    before = os.environ.get(FOLDER)
    yield
    os.environ.pop(FOLDER, None)
    if before is not None:
        os.environ[FOLDER] = before


@pytest.fixture(autouse=True)
def no_module_is_loaded_twice() -> Iterator[None]:
    """Fail a test that leaves two copies of a module: a later patch and the code may differ."""
    yield
    for name, module in list(sys.modules.items()):
        package, _, child = name.rpartition(".")
        if package.partition(".")[0] in OWN_PACKAGES:
            assert vars(sys.modules[package])[child] is module, f"{name} was loaded twice"


def _remember_config_files() -> None:
    """Read each YAML file of a package once: parsing is a third of composing the many configs."""
    Plugins.instance()  # registers the sources
    source = SourcesRegistry.instance().resolve("pkg")
    read, known = source.load_config, dict[tuple[str, ...], bytes]()

    def load_config(self: ConfigSource, config_path: str) -> ConfigResult:
        key = (self.provider, self.path, config_path)
        if key not in known:
            known[key] = pickle.dumps(read(self, config_path))
        result: ConfigResult = pickle.loads(known[key])  # a copy, for Hydra changes it
        return result

    source.load_config = load_config  # type: ignore[method-assign]


_remember_config_files()


def _auto_class(family: str) -> type:
    return AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM


def _sharpen(model: PreTrainedModel) -> None:
    """Make the next-token distributions peaked, and let every bias and norm have a say.

    Not more than this: with embeddings almost three times as large, transformers' own
    log-probabilities are already 1.2e-5 away from those with float64 weights, and no comparison to
    1e-5 would mean anything.
    """
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6 if len(parameter) == vocabulary else 8)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder("qwen2_vl", seed=0)`: a small random model's folder; peaked distributions."""

    @functools.cache
    def build(family: str, seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{seed}-")
        build = build_tiny_vl if family in GRID_FAMILIES else build_tiny_text
        (build_tiny_tiles if family in TILE_FAMILIES else build)(folder, family, seed=seed)
        model = _auto_class(family).from_pretrained(folder)
        _sharpen(model)
        model.generation_config.eos_token_id = [*model.generation_config.eos_token_id, *EXTRA_ENDS]
        model.save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def base_copy(tmp_path: Path) -> Path:
    """A copy of the embedded model, to change one of its files."""
    return shutil.copytree(model_folder("embedded:tiny_base"), tmp_path / "copy")


@pytest.fixture(scope="session")
def fresh_policy(tiny_folder: Callable[..., Path]) -> Callable[..., Policy]:
    """`fresh_policy("qwen2_vl", seed=0, dtype="float32")`: the test's own policy, to be trained."""

    def load(family: str, seed: int = 0, dtype: str = "float32", compiled_decode: bool = True) -> Policy:
        # a test in inference mode must not leave a shared policy with tensors of that mode
        with torch.inference_mode(False):
            return load_policy(tiny_folder(family, seed), dtype=dtype, compiled_decode=compiled_decode)

    return load


@pytest.fixture(scope="session")
def tiny_policy(fresh_policy: Callable[..., Policy]) -> Callable[[str], Policy]:
    """`tiny_policy("qwen2_vl")`: a policy that tests share and must not change."""
    return functools.cache(lambda family: fresh_policy(family))


@pytest.fixture(scope="session")
def transformers_model(tiny_folder: Callable[..., Path]) -> Callable[[str], PreTrainedModel]:
    """`transformers_model("qwen2_vl")`: the test's copy of the weights, transformers' attention."""

    def load(family: str, seed: int = 0) -> PreTrainedModel:
        return _auto_class(family).from_pretrained(tiny_folder(family, seed), attn_implementation="eager").eval()

    return load


@pytest.fixture(scope="session")
def tiled_pictures(tiny_folder: Callable[..., Path]) -> Callable[..., tuple[list[list[int]], dict[str, Any]]]:
    """`tiled_pictures("idefics3", rng, [(8, 4)])`: each's ids, all inputs; one of 8 x 4 patches."""
    processors = functools.cache(lambda family: load_processor(tiny_folder(family)))

    def make(family: str, rng: np.random.Generator, grids: Sequence[Grid]) -> tuple[list[list[int]], dict[str, Any]]:
        tokenizer, pictures = processors(family)
        noise = [rng.integers(0, 256, (rows * 14, columns * 14, 3), dtype=np.uint8) for rows, columns in grids]
        prepared = pictures.prepare([Image.fromarray(pixels) for pixels in noise])
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prepared.texts]
        return ids, dict(prepared.inputs)

    return make


@pytest.fixture(scope="session")
def make_prompt(
    tiny_policy: Callable[[str], Policy], tiled_pictures: Callable[..., tuple[list[list[int]], dict[str, Any]]]
) -> Callable[..., Prompt]:
    """`make_prompt("qwen2_vl", 5, length=12, grid=(8, 4))`: 12 random tokens, image if a grid.

    Several grids make as many images, one after the other.
    """

    def make(family: str, index: int, *, length: int, grid: Grid | tuple[Grid, ...] | None = None) -> Prompt:
        rng = np.random.default_rng(index)
        token_ids = rng.integers(PLAIN_TOKENS.start, PLAIN_TOKENS.stop, length).tolist()
        image_inputs: dict[str, Any] = {}
        if grid is not None:
            grids = [grid] if isinstance(grid[0], int) else list(grid)
            if family in TILE_FAMILIES:
                shown, image_inputs = tiled_pictures(family, rng, grids)
            else:
                config = tiny_policy(family).model.config
                marks = config.vision_start_token_id, config.vision_end_token_id
                shown = [[marks[0], *[config.image_token_id] * (h * w // 4), marks[1]] for h, w in grids]
                patches = (sum(h * w for h, w in grids), 6 * config.vision_config.patch_size**2)
                image_inputs = {
                    "pixel_values": rng.standard_normal(patches).astype(np.float32),
                    "image_grid_thw": np.array([[1, h, w] for h, w in grids], dtype=np.int64),
                }
            token_ids = [*token_ids[: length // 2], *itertools.chain(*shown), *token_ids[length // 2 :]]
        example = Example(id=f"p{index}", image=None, question="?", options=("a", "b"), answer=0)
        return Prompt(example, "", np.array(token_ids, dtype=np.int64), image_inputs)

    return make


@pytest.fixture(scope="session")
def mixed_prompts(make_prompt: Callable[..., Prompt]) -> Callable[[str, int], list[Prompt]]:
    """`mixed_prompts("qwen2_vl", 64)`: many lengths; vision: two of three with images."""
    grids = ((8, 8), None, ((4, 6), (2, 4)), (2, 10), None, FIVE)

    def make(family: str, count: int) -> list[Prompt]:
        return [
            make_prompt(family, i, length=3 + 7 * i % 40, grid=grids[i % 6] if family in VISION_FAMILIES else None)
            for i in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def make_group() -> Callable[..., RolloutGroup]:
    """`make_group(prompt, [1, 7, 20])`: a rollout group of random completions of these lengths."""

    def make(prompt: Prompt, lengths: list[int], *, seed: int = 0, finish_reason: str = "stop") -> RolloutGroup:
        rng = np.random.default_rng([seed, len(prompt.token_ids)])
        completions = tuple(
            Completion(
                rng.integers(PLAIN_TOKENS.start, PLAIN_TOKENS.stop, length),
                -rng.random(length).astype(np.float32),
                "",
                finish_reason,  # type: ignore[arg-type]
            )
            for length in lengths
        )
        return RolloutGroup(RolloutRequest(0, prompt, len(lengths), SamplingParams()), completions)

    return make


@pytest.fixture(scope="session")
def make_train_groups(
    make_prompt: Callable[..., Prompt], make_group: Callable[..., RolloutGroup]
) -> Callable[..., list[TrainGroup]]:
    """`make_train_groups("qwen2_vl", 4)`: ragged groups of 1, 0, 5, 0, 2 images, advantages ±.

    One prompt has completions of a single token only.
    """
    grids = ((8, 8), None, FIVE, None, ((8, 6), (4, 8)))

    def make(family: str, group_size: int, *, seed: int = 0) -> list[TrainGroup]:
        groups = []
        for i, grid in enumerate(grids):
            rng = np.random.default_rng([seed, i])
            prompt = make_prompt(family, 50 + i, length=4 + 9 * i, grid=grid if family in VISION_FAMILIES else None)
            lengths = rng.integers(1, 29, group_size).tolist() if i != 3 else [1] * group_size
            rollout = make_group(prompt, lengths, seed=seed)
            advantages = rng.standard_normal(group_size).astype(np.float32)
            groups.append(TrainGroup(ScoredGroup(rollout, advantages, {}), advantages))
        return groups

    return make
