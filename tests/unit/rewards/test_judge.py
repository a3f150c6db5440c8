"""A judge on a real server, asked by the real client: slow, wrong, overloaded, broken, or gone."""

from __future__ import annotations

import base64
import dataclasses
import io
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards.cache import RewardCache
from rewards.extra import RewardError
from rewards.rubric import Rubric
from rewards.slow_parts import SlowRewards
from rlmed.core.config.composing import compose_config
from rlmed.core.types import Example
from tests.judge_server import Reply, judging
from tests.unit.rewards.groups import EXAMPLE, group_of

pytest.importorskip("openai", reason="needs the extra serve")

GOOD = Reply('{"score": 10}')


def answered(*answers: str) -> list[str]:
    return [f"<think>x</think><answer>{answer}</answer>" for answer in answers]


@pytest.fixture
def make_rubric(request: pytest.FixtureRequest) -> Callable[..., Rubric]:
    """`make_rubric(url, retries=1)`: format and judge; what is changed is of the judge."""

    def make(
        url: str,
        *,
        path: Path | None = None,
        slow: dict[str, Any] | None = None,
        load_image: Any = None,
        **changes: Any,
    ) -> Rubric:
        config = compose_config(
            "train", ["reward=judge", f"reward.judge.url={url}", "reward.judge.model=m", "reward.slow.wait_s=0.01"]
        ).reward
        parts = SlowRewards(
            dataclasses.replace(config.slow, **(slow or {})),
            dataclasses.replace(config.judge, **changes),
            RewardCache(path),
            load_image,
        )
        rubric = Rubric.from_config({"format": 1.0, "judge": 2.0}, slow=parts)
        request.addfinalizer(rubric.close)
        return rubric

    return make


def test_marks_count_on_a_scale_from_zero_to_one_and_go_on_side_by_side(make_rubric: Callable[..., Rubric]) -> None:
    together = threading.Barrier(4)

    def answer(prompt: str, number: int) -> Reply:
        together.wait(timeout=60)  # slow: nobody is answered before all four have asked
        mark = next(mark for mark, text in enumerate(("chest", "B", "head", "none")) if f"\n{text}\n" in prompt)
        return Reply(f"Score: {mark + 1}/5")

    with judging(answer) as server:
        scored = make_rubric(server.url, scale=(1.0, 5.0)).score(
            group_of([*answered("head", "B", "chest", "none", "  ", "B"), "no tags at all"])
        )
    # without an answer nobody is asked; equal texts are asked for once
    assert scored.reward_parts["judge"].tolist() == [0.5, 0.25, 0.0, 0.75, 0.0, 0.25, 0.0]
    assert scored.rewards.tolist() == [2.0, 1.5, 1.0, 2.5, 1.0, 1.5, 0.0]
    assert server.most_at_a_time == len(server.bodies) == 4


def test_the_question_asked_has_everything_once_whatever_stands_in_it(make_rubric: Callable[..., Rubric]) -> None:
    example = dataclasses.replace(EXAMPLE, question="Where is {answer}?")
    with judging(lambda prompt, number: GOOD) as server:
        rubric = make_rubric(server.url, template="Q {question} T {truth} A {answer} {low}-{high} {x}", max_tokens=77)
        rubric.score(group_of(answered("in {truth}"), example=example))
    (body,) = server.bodies
    assert body["messages"][0]["content"] == "Q Where is {answer}?\nA) head\nB) chest T B) chest A in {truth} 0-10 {x}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 77)


def test_the_judge_reads_the_answer_without_tags(make_rubric: Callable[..., Rubric]) -> None:
    texts = ("<answer><answer>chest</answer>", "<answer><think>it </think>chest</answer>", "<answer> <answer></answer>")
    with judging(lambda prompt, number: GOOD) as server:
        scored = make_rubric(server.url, template="{question}{truth}|{answer}").score(group_of(texts))
    asked = {body["messages"][0]["content"].partition("|")[2] for body in server.bodies}
    assert asked == {"chest", "it  chest"}
    assert scored.reward_parts["judge"].tolist() == [1.0, 1.0, 0.0]


def test_pictures_are_shown_where_that_is_set(make_rubric: Callable[..., Rubric], tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    example = dataclasses.replace(EXAMPLE, image=tmp_path / "a.png", more_images=(tmp_path / "b.png",))
    with judging(lambda prompt, number: GOOD) as server:
        make_rubric(server.url, images=True, load_image=Image.open).score(group_of(answered("B"), example=example))
    *pictures, text = server.bodies[0]["messages"][0]["content"]
    assert text["type"] == "text"
    assert len(pictures) == 2
    for part in pictures:
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)


@pytest.mark.parametrize(
    "first",
    [
        Reply(status=500, body=b"{}"),
        Reply(status=503, body=b"<html>later</html>"),
        Reply("good"),
        Reply('{"score": 70}'),
        Reply(""),
        Reply(body=b'{"choices": ['),
        Reply(body=b"{}"),
        Reply(body=b'{"choices": []}'),
        Reply(body=b"[]"),
        Reply(body=b"no JSON at all", headers={"Content-Type": "text/plain"}),
        None,
    ],
)
def test_a_wrong_reply_is_asked_for_again(first: Reply | None, make_rubric: Callable[..., Rubric]) -> None:
    def answer(prompt: str, number: int) -> Reply:
        if number == 1 and first is None:
            raise ConnectionError
        return first if number == 1 and first is not None else GOOD

    with judging(answer) as server:
        scored = make_rubric(server.url, retries=1).score(group_of(answered("B")))
    assert scored.reward_parts["judge"].tolist() == [1.0]
    assert len(server.bodies) == 2


def test_too_many_requests_are_repeated_when_the_server_says(make_rubric: Callable[..., Rubric]) -> None:
    times = []

    def answer(prompt: str, number: int) -> Reply:
        times.append(time.monotonic())
        return Reply(status=429, body=b"{}", headers={"Retry-After": "0.7"}) if number == 1 else GOOD

    with judging(answer) as server:
        scored = make_rubric(server.url, retries=1).score(group_of(answered("B")))
    assert scored.reward_parts["judge"].tolist() == [1.0]
    assert times[1] - times[0] >= 0.7  # its own pause would have been 0.01 s


def closed_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{found.getsockname()[1]}/v1"


def test_a_judge_that_is_down_stops_the_run_and_says_how_to_go_on(make_rubric: Callable[..., Rubric]) -> None:
    url = closed_port()
    with pytest.raises(RewardError, match="last of 2 attempts") as error:
        make_rubric(url, retries=1).score(group_of(answered("B")))
    for part in (url, "'mri-7'", "APIConnectionError", "resume=auto", "reward.judge.on_failure=missing"):
        assert part in str(error.value)


def test_a_judge_that_hangs_is_given_up(make_rubric: Callable[..., Rubric]) -> None:
    released = threading.Event()

    def answer(prompt: str, number: int) -> Reply:
        released.wait()
        return GOOD

    with judging(answer) as server:
        with pytest.raises(RewardError, match=r"reward judge .*'mri-7'"):
            make_rubric(server.url, retries=0, timeout_s=0.2).score(group_of(answered("B")))
        released.set()


def test_a_judge_that_sends_byte_by_byte_is_given_up_too(make_rubric: Callable[..., Rubric]) -> None:
    """Each of its bytes arrives in time, and the whole reply never."""
    ended = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listening.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
        while not ended.wait(0.05):
            connection.sendall(b" ")
        connection.close()

    threading.Thread(target=drip, daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    with pytest.raises(RewardError, match=r"no result after 0\.3 s .reward\.judge\.timeout_s"):
        make_rubric(url, retries=0, timeout_s=0.3).score(group_of(answered("B")))
    ended.set()
    listening.close()


def test_a_missing_mark_leaves_the_judge_out_of_its_group_alone(
    make_rubric: Callable[..., Rubric], caplog: pytest.LogCaptureFixture
) -> None:
    def answer(prompt: str, number: int) -> Reply:
        return Reply("who knows") if "lost" in prompt else Reply('{"score": 5}')

    with judging(answer) as server, caplog.at_level(logging.WARNING):
        rubric = make_rubric(server.url, retries=0, on_failure="missing")
        bad, good = (
            rubric.score(group_of(answered(*texts), index)) for index, texts in enumerate((("B", "lost"), ("B", "C")))
        )
    np.testing.assert_array_equal(bad.reward_parts["judge"], np.array([0.5, np.nan], np.float32))
    assert bad.rewards.tolist() == [1.0, 1.0]  # of the format alone, for both
    assert bad.rewarded
    assert good.rewards.tolist() == [2.0, 2.0]
    metrics = rubric.metrics()
    assert metrics["reward/judge_missing"] == 1.0
    assert metrics["seconds/reward_calls"] > 0
    assert rubric.metrics()["reward/judge_missing"] == 0.0
    assert "reward judge on example 'mri-7'" in caplog.text


@pytest.mark.parametrize(
    ("status", "cure"), [(401, "RLMED_JUDGE_KEY"), (403, "RLMED_JUDGE_KEY"), (404, "reward.judge.url")]
)
def test_a_server_that_refuses_everything_stops_the_run_at_once(
    status: int, cure: str, make_rubric: Callable[..., Rubric]
) -> None:
    refused = Reply(status=status, body=b'{"error": {"message": "no"}}')
    with judging(lambda *_: refused) as server, pytest.raises(RewardError, match=f"status {status}") as error:
        make_rubric(server.url, retries=5, on_failure="missing").score(group_of(answered("B")))
    assert cure in str(error.value)
    assert len(server.bodies) == 1


def test_a_request_that_is_refused_is_not_repeated(make_rubric: Callable[..., Rubric]) -> None:
    """Too long for the judge's context, for example: that of another completion may not be."""

    def answer(prompt: str, number: int) -> Reply:
        return Reply(status=400, body=b"{}") if "long" in prompt else GOOD

    with judging(answer) as server:
        rubric = make_rubric(server.url, retries=5, on_failure="missing")
        marks = rubric.score(group_of(answered("long", "B"))).reward_parts["judge"]
    np.testing.assert_array_equal(marks, np.array([np.nan, 1.0], np.float32))
    assert len(server.bodies) == 2


def test_the_key_is_sent_and_written_nowhere(
    make_rubric: Callable[..., Rubric],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("RLMED_JUDGE_KEY", "sk-secret")

    def answer(prompt: str, number: int) -> Reply:
        if "told" in prompt:
            return Reply(status=401, body=b'{"error": {"message": "Incorrect API key provided: sk-secret"}}')
        return GOOD

    with judging(answer) as server, caplog.at_level(logging.DEBUG):
        rubric = make_rubric(server.url, path=tmp_path / "rewards.jsonl")
        rubric.score(group_of(answered("B")))
        with pytest.raises(RewardError, match="provided: …") as error:
            rubric.score(group_of(answered("told")))
    assert server.keys == {"Bearer sk-secret"}
    assert "sk-secret" not in str(error.value) + caplog.text + (tmp_path / "rewards.jsonl").read_text()


def test_what_the_cache_holds_is_not_asked_again(make_rubric: Callable[..., Rubric], tmp_path: Path) -> None:
    path, group = tmp_path / "rewards.jsonl", group_of(answered("A", "B"))
    with judging(lambda prompt, number: Reply(f'{{"score": {number / 3}}}')) as server:
        first = make_rubric(server.url, path=path).score(group)
        assert sorted(first.notes["judge"]) == [f'{{"score": {number / 3}}}' for number in (1, 2)]
        # another server of the same model, another time limit
        again = make_rubric(closed_port(), path=path, timeout_s=1.0).score(group)
        make_rubric(server.url, path=path, template="{question} {truth} {answer}").score(group)
    assert again.reward_parts["judge"].tolist() == first.reward_parts["judge"].tolist()
    assert again.notes == first.notes
    assert len(server.bodies) == 4


def test_a_budget_is_of_the_run_with_what_was_spent_before_a_resume(
    make_rubric: Callable[..., Rubric], tmp_path: Path
) -> None:
    path, slow = tmp_path / "rewards.jsonl", {"max_calls": 3}
    with judging(lambda prompt, number: GOOD) as server:
        make_rubric(server.url, path=path, slow=slow).score(group_of(answered("A", "B")))
        rubric = make_rubric(server.url, path=path, slow=slow, on_failure="missing")
        marks = rubric.score(group_of(answered("A", "B", "C", "D"))).reward_parts["judge"]
        assert np.isnan(marks).sum() == 1
        with pytest.raises(RewardError, match=r"3 calls are spent .reward\.slow\.max_calls"):
            make_rubric(server.url, path=path, slow=slow).score(group_of(answered("E")))
    assert len(server.bodies) == 3


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"set reward\.judge\.url and reward\.judge\.model"):
        Rubric.from_config({"judge": 1.0})
    config = compose_config("train", ["reward.judge.url=http://x/v1", "reward.judge.model=m"]).reward
    with pytest.raises(ValueError, match=r"reward\.weights has no judge"):
        Rubric.from_config({"format": 1.0}, slow=SlowRewards(config.slow, config.judge))
    for wrong in ("x", "ftp://x", "http://name:word@x/v1", "http://x/v1?key=1"):
        with pytest.raises(ValueError, match=r"reward\.judge\.url"):
            compose_config("train", [f"reward.judge.url='{wrong}'", "reward.judge.model=m"])


@pytest.mark.parametrize(
    ("task", "truth", "expected"),
    [
        ("open", {"answers": ["liver"]}, "Q?|liver"),
        ("open", {"answers": ["liver", "the {liver}"]}, "Q?|liver\nor\nthe {liver}"),
        ("report", {"references": ["A cyst."]}, "Q?|A cyst."),
        ("labels", {"labels": [], "known": ["cyst", "mass"]}, "none"),
        ("labels", {"labels": ["cyst"], "known": ["cyst", "mass"]}, "|cyst"),
        ("grounding", {"boxes": [], "frame": [1000, 1000]}, "Q?|[]"),
    ],
)
def test_other_tasks_are_judged_by_their_truth(
    task: str, truth: Any, expected: str, make_rubric: Callable[..., Rubric]
) -> None:
    example = Example(id="x", image=None, question="Q?", task=task, truth=truth)
    with judging(lambda prompt, number: GOOD) as server:
        make_rubric(server.url, template="{question}|{truth}{answer}").score(group_of(answered("."), example=example))
    content = server.bodies[0]["messages"][0]["content"]
    assert content.startswith("Q?")
    assert content.endswith(f"{expected}.")


def test_requests_leave_no_line_each(make_rubric: Callable[..., Rubric], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name in ("httpx", "httpx2", "openai"):
        caplog.set_level(logging.NOTSET, logger=name)
    with judging(lambda prompt, number: GOOD) as server:
        make_rubric(server.url).score(group_of(answered("a", "b")))
        assert len(server.bodies) == 2
    assert caplog.messages == []
