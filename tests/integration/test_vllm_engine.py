"""vLLM's engine against learner and native engine: same tokens, log-probabilities, new weights."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import queue
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from learner.packing import PackItem, TrainSequence, pack
from rlmed.core.types import Example, RolloutRequest, SamplingParams
from rlmed.core.weights import EngineHandle, WeightError
from rlmed.data.prompts import PromptRenderer, load_processor
from rlmed.models import direct
from rlmed.models.direct import DirectSender
from rlmed.models.families import PARTS as MODEL_PARTS
from rlmed.models.families import family_of
from rlmed.models.policy import load_policy
from rlmed.models.weights import make_buckets
from rollout.native.engine import NativeEngine
from tests.conftest import VISION_FAMILIES
from tests.integration.vllm_models import build_model
from tests.rounding import LOGPROBS, worst_difference

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
]

TOLERANCE = LOGPROBS
MAX_COMPLETIONS = 12
MAX_IMAGES = 2
QUESTION = "which part of the body is shown in this scan, and what does it tell about the patient "
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "internvl", "internvl_qwen2", "llava_onevision")
FAMILIES += ("qwen2", "qwen3", "llama", "gemma3_text")
PARTS = {
    "language": lambda name: ".language_model.layers." in name,
    "embeddings": lambda name: "embed_tokens" in name,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("vllm_model"))


@pytest.fixture(scope="module")
def open_engine():
    """`open_engine(folder)`: the engine of a folder.

    A process has one at a time, so another folder's closes it.
    """
    from rollout.vllm_backend.engine import VllmEngine
    from rollout.vllm_backend.settings import VllmSettings

    set_num_threads = torch.set_num_threads  # vLLM's CPU worker takes it away
    opened = {}

    def close():
        for engine in opened.values():
            engine.close()
        opened.clear()

    def open_folder(folder, max_prompt_tokens=256):
        if (folder, max_prompt_tokens) not in opened:
            close()
            settings = VllmSettings(
                dtype="float32",
                max_completions=MAX_COMPLETIONS,
                max_prompt_tokens=max_prompt_tokens,
                max_images=MAX_IMAGES,
                max_tokens=32,
                enforce_eager=True,
            )
            opened[folder, max_prompt_tokens] = VllmEngine(folder, settings)
        return opened[folder, max_prompt_tokens]

    yield open_folder
    close()
    torch.set_num_threads = set_num_threads


@pytest.fixture
def policy(folder):
    """A policy of the test's own."""
    return load_policy(folder)


@pytest.fixture
def engine(open_engine, folder):
    """With the folder's weights and without work."""
    engine = open_engine(folder)
    yield engine
    engine.abort()
    push(engine, load_policy(folder), 0)


@pytest.fixture(scope="module")
def renderer(folder):
    return PromptRenderer(*load_processor(folder), max_prompt_tokens=256, template="{question}")


def render(renderer, *, images=True):
    """With one picture, none, two of other sizes; longer than several prefix-cache blocks."""
    rendered = []
    for i, sizes in enumerate((((112, 112),), (), ((56, 84),), (), ((84, 56), (112, 84)))):
        rng = np.random.default_rng(i)
        shown = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes if images]
        question = QUESTION * (1 + i % 2) + str(i)
        rendered.append(renderer.render(Example(str(i), None, question, ("a", "b"), answer=0), shown))
    assert max(len(prompt.token_ids) for prompt in rendered) > 100
    return rendered


@pytest.fixture(scope="module")
def prompts(renderer):
    return render(renderer)


def request(prompt, index=0, group_size=1, **sampling):
    return RolloutRequest(index, prompt, group_size, SamplingParams(**{"seed": index, "max_tokens": 12, **sampling}))


def finish(engine):
    groups = []
    while engine.busy:
        groups += engine.step()
    return sorted(groups, key=lambda group: group.request.index)


def rollout(engine, prompts, group_size=1, **sampling):
    for index, prompt in enumerate(prompts):
        engine.submit(request(prompt, index, group_size, **sampling))
    return finish(engine)


def buckets(entries):
    """One for each tensor, as they may be cut anywhere."""
    return [copy.deepcopy(bucket) for bucket in make_buckets(entries, bucket_bytes=1)]


def push(engine, policy, version):
    engine.update_weights(version, buckets(policy.model.named_parameters()))


def tokens(groups):
    return [completion.token_ids.tolist() for group in groups for completion in group.completions]


@torch.no_grad()
def learner_logprobs(policy, groups):
    """Of all sampled tokens in order, under the distribution that each group's settings name."""
    result = []
    for group in groups:
        sampling = group.request.sampling
        warpers = LogitsProcessorList([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else [])
        warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        sequences = tuple(TrainSequence(completion, 1.0) for completion in group.completions)
        batch = pack([PackItem(group.prompt, sequences)], policy)
        hidden = policy.hidden(batch.token_ids, batch.positions, batch.layout, batch.image_inputs)
        logits = policy.logits(hidden[batch.predictors]) / (sampling.temperature or 1.0)
        result.append(warpers(None, logits).log_softmax(1).gather(1, batch.targets[:, None])[:, 0])
    return torch.cat(result).numpy()


def disagreement(policy, groups):
    """Largest difference between the engine's logprobs and the learner's."""
    reported = [completion.rollout_logprobs for group in groups for completion in group.completions]
    return np.abs(np.concatenate(reported) - learner_logprobs(policy, groups)).max()


def change(policy, part=None):
    """Change the weights of one part, or of all, by a third or so."""
    generator = torch.Generator().manual_seed(0)
    part_of = family_of(policy.model.config).part_of
    chosen = [
        parameter
        for name, parameter in policy.model.named_parameters()
        if part is None or (PARTS[part](name) if part in PARTS else part_of(name) == part)
    ]
    assert chosen
    with torch.no_grad():
        for parameter in chosen:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * parameter.abs().mean() * noise)


def test_greedy_tokens_and_logprobs_are_those_of_the_native_engine(engine, policy, renderer, prompts):
    groups = rollout(engine, prompts, group_size=2, temperature=0.0)
    native = rollout(NativeEngine(policy, renderer.decode), prompts, group_size=2, temperature=0.0)
    for number in range(2):  # both completions of a group are decided alike
        halves = [
            [dataclasses.replace(group, completions=(group.completions[number],)) for group in side]
            for side in (native, groups)
        ]
        assert worst_difference(*halves, policy) < TOLERANCE
    assert len({tuple(ids) for ids in tokens(groups)}) == len(prompts)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 9, 1.0), (1.3, 0, 0.8), (0.7, 40, 0.9)]
)
def test_logprobs_are_the_learners_under_the_sampled_distribution(engine, policy, prompts, temperature, top_k, top_p):
    groups = rollout(engine, prompts, group_size=4, temperature=temperature, top_k=top_k, top_p=top_p)
    assert disagreement(policy, groups) < TOLERANCE
    assert all(len({tuple(ids) for ids in tokens([group])}) > 1 for group in groups)


def test_greedy_and_random_groups_share_a_batch(engine, policy, prompts):
    settings = [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1.3}]
    for i, sampling in enumerate(settings):
        engine.submit(request(prompts[i], i, group_size=3, **sampling))
    assert disagreement(policy, finish(engine)) < TOLERANCE


def test_a_control_image_is_seen_as_the_pixels_that_the_prompt_holds(engine, policy, renderer, prompts):
    blank = dataclasses.replace(
        prompts[0],
        image_inputs={
            **prompts[0].image_inputs,
            "pixel_values": np.zeros_like(prompts[0].image_inputs["pixel_values"]),
        },
    )
    seen, unseen = rollout(engine, [prompts[0], blank], temperature=0.0)
    assert disagreement(policy, [seen, unseen]) < TOLERANCE
    assert tokens([seen]) != tokens([unseen])


def test_tokens_that_stand_for_images_are_never_sampled(engine, policy, prompts):
    with torch.no_grad():  # they would be the most likely ones by far
        embeddings = policy.model.get_input_embeddings().weight
        embeddings[list(policy.banned_token_ids)] = 3 * embeddings[50:60].mean(0)
        embeddings[list(policy.banned_token_ids)] *= 4
    push(engine, policy, 1)
    groups = rollout(engine, prompts, group_size=4)
    assert not {token for ids in tokens(groups) for token in ids} & set(policy.banned_token_ids)
    assert disagreement(policy, groups) < TOLERANCE
    policy._banned = policy._banned[:0]
    assert disagreement(policy, groups) > 100 * TOLERANCE


def test_a_stop_string_ends_a_completion_and_is_kept(engine, renderer, policy, prompts):
    free = rollout(engine, prompts, temperature=0.0)
    text = free[1].completions[0].text
    stop = text[2:4]
    assert stop.isprintable()
    groups = rollout(engine, prompts, temperature=0.0, stop=(stop, "no such text"))
    native = rollout(NativeEngine(policy, renderer.decode), prompts, temperature=0.0, stop=(stop, "no such text"))
    stopped = groups[1].completions[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop) + len(stop)]
    assert len(stopped.token_ids) < len(free[1].completions[0].token_ids)
    assert len(stopped.rollout_logprobs) == len(stopped.token_ids)
    assert worst_difference(native, groups, policy) < TOLERANCE


def test_a_seed_fixes_a_completion_whatever_runs_beside_it(engine, prompts):
    alone = rollout(engine, prompts[:1], group_size=4)
    for index in (3, 0, 2):
        engine.submit(request(prompts[index], index, group_size=4))
    assert worst_difference(alone, finish(engine)[:1]) < TOLERANCE
    engine.submit(request(prompts[0], 1, group_size=4))
    (other_seed,) = finish(engine)
    # the streams of one group are not those of the next one, moved by one
    assert not {tuple(ids) for ids in tokens([other_seed])} & {tuple(ids) for ids in tokens(alone)}


@pytest.mark.parametrize("part", ["vision", "merger", *PARTS])
def test_after_a_push_logprobs_are_those_of_the_new_weights(engine, policy, prompts, part):
    before = rollout(engine, prompts, group_size=2)
    change(policy, part)
    assert disagreement(policy, before) > 100 * TOLERANCE
    push(engine, policy, 1)
    groups = rollout(engine, prompts, group_size=2)
    assert disagreement(policy, groups) < TOLERANCE
    assert {(c.min_version, c.max_version) for group in groups for c in group.completions} == {(1, 1)}


def _same_names(monkeypatch):
    from rollout.vllm_backend import engine as module

    original = module.engine_input
    monkeypatch.setattr(module, "engine_input", lambda prompt, facts, epoch: original(prompt, facts, 0))


def _same_salt(monkeypatch):
    from rollout.vllm_backend import engine as module

    original = module.engine_input
    monkeypatch.setattr(
        module, "engine_input", lambda prompt, facts, epoch: {**original(prompt, facts, epoch), "cache_salt": "same"}
    )


def _same_image_names(monkeypatch):
    from rollout.vllm_backend import engine as module

    original = module.engine_input

    def renamed(prompt, facts, epoch):
        entry = original(prompt, facts, epoch)
        if "mm_hashes" in entry:
            entry["mm_hashes"] = {"image": [name.split("-")[-1] for name in entry["mm_hashes"]["image"]]}
        return entry

    monkeypatch.setattr(module, "engine_input", renamed)


def _no_repacking(monkeypatch):
    from rollout.vllm_backend import weight_transfer

    monkeypatch.setattr(weight_transfer, "repack_projections", lambda transfer: None)


@pytest.mark.parametrize(
    ("omit", "part", "with_image"),
    [
        (_same_salt, "language", False),
        (_same_image_names, "vision", True),
        (_same_image_names, "merger", True),
        (_same_names, "language", True),
        (_no_repacking, "embeddings", False),
    ],
)
def test_without_any_one_of_the_precautions_old_weights_live_on(
    engine, policy, prompts, monkeypatch, omit, part, with_image
):
    omit(monkeypatch)
    chosen = [prompt for prompt in prompts if bool(prompt.image_inputs) is with_image]
    rollout(engine, chosen, group_size=2)
    change(policy, part)
    push(engine, policy, 1)
    groups = rollout(engine, chosen, group_size=2)
    assert disagreement(policy, groups) > 10 * TOLERANCE
    # what was computed here under names without their weights is not to be found again
    engine._epoch += 1000


def test_running_completions_go_on_under_new_weights_and_say_so(engine, policy, renderer, prompts):
    native = NativeEngine(load_policy(policy.model.name_or_path), renderer.decode)
    change(policy, "language")
    results = []
    for tested in (engine, native):
        for index, prompt in enumerate(prompts[:3]):
            tested.submit(request(prompt, index, 2, temperature=0.0, max_tokens=6 + 6 * index))
        for _ in range(3):
            assert tested.step() == []
        push(tested, policy, 1)
        # the prompt is known, by other weights
        tested.submit(request(prompts[0], 3, temperature=0.0))
        results.append(finish(tested))
    groups, expected = results
    # of two policies, so nobody is asked how near an edge is
    assert worst_difference(expected, groups) < TOLERANCE
    for group, other in zip(groups, expected, strict=True):
        for one, two in zip(group.completions, other.completions, strict=True):
            assert (one.min_version, one.max_version) == (two.min_version, two.max_version)
    assert groups[0].completions[0].min_version == 0
    assert groups[2].completions[0].max_version == 1
    assert groups[3].min_version == 1
    assert disagreement(policy, groups[3:]) < TOLERANCE


def test_groups_without_a_token_are_started_anew_under_new_weights(engine, policy, prompts):
    engine.submit(request(prompts[0], 0, group_size=4))
    engine._start_group(engine._scheduler.admit(MAX_COMPLETIONS)[0])
    change(policy, "vision")
    push(engine, policy, 1)
    (group,) = finish(engine)
    assert group.min_version == 1
    assert len(group.completions) == 4
    assert disagreement(policy, [group]) < TOLERANCE


def test_weights_may_change_after_they_were_handed_over(engine, policy, prompts):
    change(policy, "language")
    passing = buckets(policy.model.named_parameters())
    engine.update_weights(1, passing)
    for bucket in passing:
        bucket.data.fill(7)
    assert disagreement(policy, rollout(engine, prompts)) < TOLERANCE


def test_weights_of_another_model_are_refused_and_nothing_changes(engine, policy, prompts):
    before = rollout(engine, prompts)
    name, parameter = next(iter(policy.model.named_parameters()))
    for wrong in ((f"{name}.x", parameter), (name, parameter[:1])):
        with pytest.raises(WeightError, match=name):
            engine.update_weights(1, buckets([wrong]))
        assert tokens(rollout(engine, prompts)) == tokens(before)


def test_an_incomplete_push_is_refused_and_a_damaged_one_is_an_error_until_a_complete_one_comes(
    engine, policy, prompts
):
    before = tokens(rollout(engine, prompts))
    change(policy, "language")
    entries = list(policy.model.named_parameters())
    names = [name for name, _ in entries]
    dropped = next(name for name in names if name.endswith("k_proj.weight"))
    with pytest.raises(WeightError, match=dropped):
        engine.update_weights(1, buckets(entry for entry in entries if entry[0] != dropped))
    assert tokens(rollout(engine, prompts)) == before
    damaged = buckets(entries)
    damaged[names.index(dropped)].data[0] ^= 1
    with pytest.raises(WeightError, match=rf"{dropped} were damaged"):
        engine.update_weights(1, damaged)
    engine.submit(request(prompts[0]))
    with pytest.raises(WeightError, match="push all of them again"):
        engine.step()
    push(engine, policy, 2)
    (group,) = finish(engine)
    assert group.min_version == 2
    assert disagreement(policy, [group]) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 33}, "max_tokens=33 exceeds the engine's 32"),
        ({"temperature": 2.5}, "temperature=2.5 with rollout=vllm"),
        ({"temperature": 0.001}, "temperature=0.001 with rollout=vllm"),
    ],
)
def test_what_vllm_cannot_sample_is_refused_at_once(engine, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(request(prompts[0], **changes))
    assert not engine.busy


def test_placeholders_that_do_not_fit_the_image_are_refused(engine, prompts):
    prompt, middle = prompts[0], int(np.flatnonzero(prompts[0].token_ids == engine._facts.image_token_id)[5])
    torn = prompt.token_ids.copy()
    torn[[middle, -1]] = torn[[-1, middle]]
    for broken in (
        dataclasses.replace(prompt, token_ids=np.delete(prompt.token_ids, middle)),
        dataclasses.replace(prompt, token_ids=torn),
        dataclasses.replace(prompt, image_inputs={}),
    ):
        with pytest.raises(ValueError, match="image placeholders"):
            engine.submit(request(broken))
    assert not engine.busy


def test_several_images_are_seen_each_and_in_their_order(engine, policy, prompts):
    prompt = prompts[-1]
    grids, pixels = prompt.image_inputs["image_grid_thw"], prompt.image_inputs["pixel_values"]
    assert len(grids) == MAX_IMAGES
    changed = [prompt]
    for patches in (slice(0, grids[0].prod()), slice(grids[0].prod(), None)):
        blank = pixels.copy()
        blank[patches] = 0
        changed.append(dataclasses.replace(prompt, image_inputs={**prompt.image_inputs, "pixel_values": blank}))
    groups = rollout(engine, changed, group_size=2, temperature=0.0)
    assert disagreement(policy, groups) < TOLERANCE
    logprobs = {tuple(group.completions[0].rollout_logprobs[:1].tolist()) for group in groups}
    assert len(logprobs) == 3


def test_more_images_than_the_engine_was_made_for_are_refused_with_numbers(engine, prompts):
    prompt = prompts[-1]
    doubled = {name: np.concatenate([array, array]) for name, array in prompt.image_inputs.items()}
    with pytest.raises(ValueError, match=rf"'4' has {2 * MAX_IMAGES} images, and the engine takes {MAX_IMAGES}"):
        engine.submit(request(dataclasses.replace(prompt, image_inputs=doubled)))
    assert not engine.busy


def test_long_prompts_that_come_at_once_are_computed_whole(open_engine, folder, policy):
    renderer = PromptRenderer(*load_processor(folder), max_prompt_tokens=768, template="{question}")
    length = len(renderer.render(Example("0", None, QUESTION, ("a", "b"), 0), None).token_ids)
    questions = [f"{number} {QUESTION * (600 // length)}" for number in range(MAX_COMPLETIONS)]
    prompts = [renderer.render(Example("0", None, question, ("a", "b"), 0), None) for question in questions]
    # vLLM computes 2,048 tokens at a time by default, so one of them would be computed in parts
    assert sum(len(prompt.token_ids) for prompt in prompts) > 2048
    groups = rollout(open_engine(folder, max_prompt_tokens=768), prompts, max_tokens=4)
    assert len(groups) == len(prompts)
    assert disagreement(policy, groups) < TOLERANCE


def with_picture(prompt, image_token_id, seed, question_token=20):
    """The prompt with another, larger picture, 420 visual tokens, then `question_token`."""
    rows, columns = 20, 21
    (places,) = np.nonzero(prompt.token_ids == image_token_id)
    before, after = prompt.token_ids[: places[0]], prompt.token_ids[places[-1] + 1 :].copy()
    after[1] = question_token  # the first one closes the picture
    token_ids = np.concatenate([before, np.full(rows * columns, image_token_id), after])
    width = prompt.image_inputs["pixel_values"].shape[1]
    pixels = np.random.default_rng(seed).standard_normal((4 * rows * columns, width), dtype=np.float32)
    pictures = {"pixel_values": pixels, "image_grid_thw": np.array([[1, 2 * rows, 2 * columns]])}
    return dataclasses.replace(prompt, token_ids=token_ids, image_inputs=pictures)


def test_a_new_picture_beside_many_new_questions_about_known_ones_is_computed_whole(
    open_engine, folder, policy, prompts
):
    engine = open_engine(folder, max_prompt_tokens=768)
    token = engine._facts.image_token_id
    # as many pictures as vLLM computes tokens at a time; as many again, so that it keeps none of
    # them, only keys and values
    count = engine._core.vllm_config.scheduler_config.max_num_batched_tokens // 420
    for first in (0, count + 1):
        rollout(engine, [with_picture(prompts[0], token, first + i) for i in range(count + 1)], max_tokens=1)
    asked = [with_picture(prompts[0], token, seed, question_token=21) for seed in range(count)]
    # few of their tokens are new, but all their pictures have to be encoded again
    groups = rollout(engine, [*asked, with_picture(prompts[0], token, 200)], max_tokens=4)
    assert len(groups) == count + 1
    assert disagreement(policy, groups) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_the_learner_before_and_after_a_push(open_engine, tmp_path, family):
    folder = build_model(tmp_path, family)
    engine, policy = open_engine(folder), load_policy(folder)
    renderer = PromptRenderer(*load_processor(folder), max_prompt_tokens=256, template="{question}")
    prompts = render(renderer, images=family in VISION_FAMILIES)
    groups = rollout(engine, prompts, group_size=2)
    assert disagreement(policy, groups) < TOLERANCE
    for part in MODEL_PARTS if family in VISION_FAMILIES else MODEL_PARTS[-1:]:
        before = learner_logprobs(policy, groups)
        change(policy, part)
        assert np.abs(learner_logprobs(policy, groups) - before).max() > 100 * TOLERANCE
    push(engine, policy, 1)
    assert disagreement(policy, rollout(engine, prompts, group_size=2)) < TOLERANCE
    native = rollout(NativeEngine(policy, renderer.decode), prompts, temperature=0.0)
    assert worst_difference(native, rollout(engine, prompts, temperature=0.0), policy) < TOLERANCE


def test_children_of_this_process_do_not_inherit_what_vllm_preloads(open_engine, folder):
    open_engine(folder)
    assert "torch" not in os.environ.get("LD_PRELOAD", "")


@pytest.mark.parametrize("transport", ["gloo", "ipc"])
def test_weights_arrive_as_learner_rank_0_sends_them(engine, policy, prompts, transport, monkeypatch):
    """By `ipc` this process's memory stands in for a GPU's."""
    monkeypatch.setattr(direct, "BUCKET_BYTES", 50_000)
    sender = DirectSender(policy.model.named_parameters(), torch.device("cpu"), "127.0.0.1")
    handle, before = EngineHandle("engine", 0, engine.devices), rollout(engine, prompts, group_size=2)
    for version in (1, 2):
        change(policy)
        offers, done = queue.SimpleQueue(), Future()

        def call(_, sent, offers=offers, done=done):
            offers.put(sent)
            return done

        with ThreadPoolExecutor(1) as thread:
            tensors = policy.model.named_parameters()
            sending = thread.submit(sender.send, transport, [handle], call, tensors, 60.0)
            engine.update_weights(version, [offers.get(timeout=60)])
            done.set_result(None)
            sending.result(timeout=60)
        groups = rollout(engine, prompts, group_size=2)
        assert disagreement(policy, groups) < TOLERANCE
        assert disagreement(policy, before) > 100 * TOLERANCE
        assert {completion.max_version for group in groups for completion in group.completions} == {version}
