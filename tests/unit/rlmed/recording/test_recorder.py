import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlmed.core.files.atomic import RecordError
from rlmed.core.files.jsonlines import read_json_lines
from rlmed.core.tracing import Tracer
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
from rlmed.recording import recorder as module
from rlmed.recording.batches import read_batch
from rlmed.recording.recorder import RunRecorder

TEXTS = ("<think>dark</think><answer>B</answer>", "no tags </script>")


def make_group(index=5, rewards=(2.0, 0.0), image=Path("/data/7.png"), more_images=()):
    example = Example(
        "mri-7",
        image,
        "Which part?",
        ("head", "knee"),
        answer=1,
        modality="MRI",
        kind="anatomy",
        more_images=more_images,
    )
    prompt = Prompt(example, "text", np.arange(4), {"pixel_values": np.ones((2, 3), dtype=np.float32)})
    completions = (
        Completion(np.arange(3), np.array([-0.1, -0.2, -0.3], dtype=np.float32), TEXTS[0], "stop", 3, 4),
        Completion(np.arange(2), np.array([-1.0, -2.0], dtype=np.float32), TEXTS[1], "length", 4, 4),
    )
    rollout = RolloutGroup(RolloutRequest(index, prompt, 2, SamplingParams(seed=9, stop=("x",))), completions)
    parts = {"format": np.array([1, 0], dtype=np.float32), "choice": np.array([1, 0], dtype=np.float32)}
    scored = ScoredGroup(rollout, np.array(rewards, dtype=np.float32), parts)
    return TrainGroup(scored, np.array([0.5, -0.5], dtype=np.float32))


def test_metrics_are_one_object_a_step(tmp_path):
    with RunRecorder(tmp_path) as recorder:
        recorder.record_step(1, {"policy_version": 1.0, "reward/mean": np.float32(1.5), "kl": float("nan")})
        recorder.record_step(2, {"policy_version": 2.0, "reward/mean": 1.75, "kl": 0.25})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "policy_version": 1, "reward/mean": 1.5, "kl": None}
    assert lines[1] == '{"step": 2, "policy_version": 2, "reward/mean": 1.75, "kl": 0.25}'


def test_groups_are_written_with_everything_a_reader_needs(tmp_path):
    group = make_group()
    with RunRecorder(tmp_path) as recorder:
        recorder.record_groups(3, [group], [make_group(6, (float("nan"), 1.0), image=None).scored])
    learnt, discarded = read_json_lines(tmp_path / "rollouts.jsonl")
    assert learnt == {
        "step": 3,
        "index": 5,
        "example_id": "mri-7",
        "image": "/data/7.png",
        "question": "Which part?",
        "options": ["head", "knee"],
        "answer": "B",
        "modality": "MRI",
        "question_type": "anatomy",
        "completions": [
            {
                "text": TEXTS[0],
                "reward": 2.0,
                "reward_parts": {"format": 1.0, "choice": 1.0},
                "advantage": 0.5,
                "tokens": 3,
                "finish_reason": "stop",
                "min_version": 3,
                "max_version": 4,
            },
            {
                "text": TEXTS[1],
                "reward": 0.0,
                "reward_parts": {"format": 0.0, "choice": 0.0},
                "advantage": -0.5,
                "tokens": 2,
                "finish_reason": "length",
                "min_version": 4,
                "max_version": 4,
            },
        ],
    }
    assert discarded["image"] is None
    assert [entry["advantage"] for entry in discarded["completions"]] == [None, None]
    assert [entry["reward"] for entry in discarded["completions"]] == [None, 1.0]


def test_what_rewards_wrote_stands_beside_the_completion(tmp_path):
    scored = dataclasses.replace(make_group().scored, notes={"judge": ("x" * 3000, ""), "other": ("short", "")})
    with RunRecorder(tmp_path) as recorder:
        recorder.record_groups(1, [], [scored])
    (group,) = read_json_lines(tmp_path / "rollouts.jsonl")
    first, second = group["completions"]
    assert first["notes"] == {"judge": "x" * 2000 + "…", "other": "short"}
    assert "notes" not in second


def test_the_sum_of_a_group_that_lacks_all_its_rewards_is_null(tmp_path):
    lacking = dataclasses.replace(make_group().scored, rewards=np.zeros(2, np.float32), missing=("judge",))
    with RunRecorder(tmp_path) as recorder:
        recorder.record_groups(1, [], [lacking, dataclasses.replace(lacking, rewarded=False)])
    rewards = [
        [entry["reward"] for entry in group["completions"]] for group in read_json_lines(tmp_path / "rollouts.jsonl")
    ]
    assert rewards == [[0.0, 0.0], [None, None]]


def test_a_recorded_batch_keeps_what_is_missing_and_what_rewards_wrote(tmp_path):
    group = make_group()
    scored = dataclasses.replace(group.scored, missing=("judge",), notes={"judge": ("good", "")}, rewarded=False)
    with RunRecorder(tmp_path) as recorder:
        recorder.record_batch(7, [dataclasses.replace(group, scored=scored)])
    ((read,), _) = read_batch(tmp_path / "batches" / "000007.npz")
    assert (read.scored.missing, read.scored.notes, read.scored.rewarded) == (
        ("judge",),
        {"judge": ("good", "")},
        False,
    )


def test_a_group_about_several_images_names_them_in_order(tmp_path):
    with RunRecorder(tmp_path) as recorder:
        recorder.record_groups(1, [make_group(more_images=(Path("/data/9.png"), Path("/data/8.png")))], [])
    (group,) = read_json_lines(tmp_path / "rollouts.jsonl")
    assert [group["image"], *group["more_images"]] == ["/data/7.png", "/data/9.png", "/data/8.png"]


def test_killed_and_resumed_run_has_each_step_once(tmp_path):
    first = RunRecorder(tmp_path)
    tracer = Tracer(tmp_path / "timeline.jsonl")
    for step in (1, 2, 3):
        with tracer.span("learn", step=step):
            first.record_step(step, {"loss": float(step)})
        first.record_groups(step, [make_group(step)], [])
        if step == 2:
            saved = json.loads(json.dumps(first.offsets()))
    for name in ("metrics.jsonl", "rollouts.jsonl", "timeline.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 4, "ha')  # killed while it wrote
    second = RunRecorder(tmp_path)
    second.truncate(saved)
    tracer = Tracer(tmp_path / "timeline.jsonl")
    for step in (3, 4):
        with tracer.span("learn", step=step):
            second.record_step(step, {"loss": float(10 * step)})
        second.record_groups(step, [make_group(step)], [])
    second.close()
    first.close()
    assert [(line["step"], line["loss"]) for line in read_json_lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]
    for name in ("rollouts.jsonl", "timeline.jsonl"):
        assert [line["step"] for line in read_json_lines(tmp_path / name)] == [1, 2, 3, 4]


def test_truncate_with_nothing_starts_anew(tmp_path):
    with RunRecorder(tmp_path) as recorder:
        recorder.record_step(1, {})
    RunRecorder(tmp_path).truncate({})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_file_shorter_than_the_checkpoint_says_is_an_error(tmp_path):
    with RunRecorder(tmp_path) as recorder:
        recorder.record_step(1, {"loss": 1.0})
        with pytest.raises(RecordError, match=r"rollouts\.jsonl has 0 bytes, but 99"):
            recorder.truncate({"metrics.jsonl": 5, "rollouts.jsonl": 99})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n', "nothing is cut when one cannot be"


def scalars(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_metrics_and_accuracy_and_forgets_what_a_resume_repeats(tmp_path):
    with RunRecorder(tmp_path) as recorder:
        recorder.record_evaluation(0, {"mri": 0.5})
        for step in (1, 2, 3):
            recorder.record_step(step, {"reward/mean": float(step), "kl": float("nan")})
    with RunRecorder(tmp_path) as recorder:
        recorder.record_step(2, {"reward/mean": 20.0})
    assert scalars(tmp_path / "tensorboard", "accuracy/mri") == [(0, 0.5)]
    assert scalars(tmp_path / "tensorboard", "reward/mean") == [(1, 1.0), (2, 20.0)]


def test_a_bad_step_is_kept_whole_for_replay(tmp_path):
    recorder = RunRecorder(tmp_path)
    group = make_group()
    several = make_group(7, more_images=(Path("/data/9.png"), Path("/data/8.png")))
    recorder.dump_bad_step([group, make_group(6, image=None), several], "loss nan, gradient norm inf")
    groups, reason = read_batch(tmp_path / "bad_steps" / "001.npz")
    assert reason == "loss nan, gradient norm inf"
    first = groups[0]
    assert first.rollout.request.sampling == group.rollout.request.sampling
    assert first.rollout.prompt.example == group.rollout.prompt.example
    assert groups[1].rollout.prompt.example.image is None
    assert groups[2].rollout.prompt.example == several.rollout.prompt.example
    np.testing.assert_array_equal(first.rollout.prompt.token_ids, group.rollout.prompt.token_ids)
    np.testing.assert_array_equal(first.rollout.prompt.image_inputs["pixel_values"], np.ones((2, 3)))
    np.testing.assert_array_equal(first.advantages, group.advantages)
    np.testing.assert_array_equal(first.scored.reward_parts["choice"], [1, 0])
    for loaded, original in zip(first.rollout.completions, group.rollout.completions, strict=True):
        assert (loaded.text, loaded.finish_reason, loaded.min_version, loaded.max_version) == (
            original.text,
            original.finish_reason,
            original.min_version,
            original.max_version,
        )
        np.testing.assert_array_equal(loaded.rollout_logprobs, original.rollout_logprobs)
        np.testing.assert_array_equal(loaded.token_ids, original.token_ids)


def test_bad_steps_do_not_fill_the_disk(tmp_path):
    recorder = RunRecorder(tmp_path)
    for _ in range(module.BAD_STEPS_KEPT + 3):
        recorder.dump_bad_step([make_group()], "nan")
    assert len(list((tmp_path / "bad_steps").iterdir())) == module.BAD_STEPS_KEPT
