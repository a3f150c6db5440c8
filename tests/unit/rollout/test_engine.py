"""What the engine does around the model: ends, stop strings, streaming, abort, memory."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref

import pytest
import torch

from rollout.native import engine as engine_module
from rollout.native.engine import NativeEngine
from rollout.native.sampler import completion_seeds, uniforms
from rollout.native.scheduler import EngineLimits
from rollout.native.slots import StepPlan
from tests.plans import PLANS
from tests.rounding import rounding

LETTERS = "".join(chr(ord("a") + i % 26) for i in range(64))


def letters(token_ids):
    """Token 0 ends a completion and has no text; token 1 is b, 2 is c, ..."""
    return "".join(LETTERS[token] for token in token_ids if token)


def pieces(*texts):
    """A decoder where token i + 2 is the i-th bytes piece; a prompt ending in token 1 starts it."""
    table = [text if isinstance(text, bytes) else text.encode() for text in texts]
    table += [b"."] * (64 - len(table))
    return lambda token_ids: b"".join(table[token - 2] for token in token_ids).decode(errors="replace")


def new_engine(policy, decode=letters, **limits):
    return NativeEngine(policy, decode, EngineLimits(**limits))


@pytest.fixture(autouse=True, params=PLANS)
def plan(request, monkeypatch):
    """Every test runs on each of the plans."""
    monkeypatch.setattr(StepPlan, "for_device", lambda device: PLANS[request.param])
    return PLANS[request.param]


def finish(engine):
    """All groups in order of completion."""
    groups = []
    while engine.busy:
        groups += engine.step()
    return groups


def only_completion(engine, request):
    engine.submit(request)
    (group,) = finish(engine)
    (completion,) = group.completions
    return completion


def test_a_completion_ends_with_its_end_token(chain, make_request):
    completion = only_completion(new_engine(chain({5: [0]})), make_request(start=2))
    assert completion.token_ids.tolist() == [3, 4, 5, 0]
    assert (completion.finish_reason, completion.text) == ("stop", "def")
    assert completion.rollout_logprobs.tolist() == [0.0] * 4


def test_an_end_token_is_no_part_of_the_text_even_where_the_tokenizer_takes_it_for_text(chain, make_request):
    engine = new_engine(chain({5: [0]}), lambda token_ids: "".join(LETTERS[token] for token in token_ids))
    assert only_completion(engine, make_request(start=2)).text == "def"
    # cut by length, the last token is text
    assert only_completion(engine, make_request(start=2, max_tokens=2)).text == "de"


@pytest.mark.parametrize(("prefill", "text"), [("", "def"), ("<think>\n", "<think>\ndef")])
def test_a_completion_begins_with_what_the_template_has_written_of_it(chain, make_request, prefill, text):
    request = make_request(start=2, stop=("f",))
    request = dataclasses.replace(request, prompt=dataclasses.replace(request.prompt, prefill=prefill))
    completion = only_completion(new_engine(chain()), request)
    assert (completion.text, completion.token_ids.tolist()) == (text, [3, 4, 5])


def test_an_end_token_may_come_first(chain, make_request):
    completion = only_completion(new_engine(chain({2: [0]})), make_request(start=2))
    assert (completion.token_ids.tolist(), completion.finish_reason, completion.text) == ([0], "stop", "")


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_a_completion_is_cut_at_max_tokens(max_tokens, chain, make_request):
    completion = only_completion(new_engine(chain()), make_request(start=2, max_tokens=max_tokens))
    assert completion.token_ids.tolist() == list(range(3, 3 + max_tokens))
    assert completion.finish_reason == "length"
    assert completion.text == LETTERS[3 : 3 + max_tokens]


def test_an_end_token_at_the_limit_is_a_stop(chain, make_request):
    completion = only_completion(new_engine(chain({4: [0]})), make_request(start=2, max_tokens=3))
    assert (completion.token_ids.tolist(), completion.finish_reason) == ([3, 4, 0], "stop")


def test_a_stop_string_over_several_tokens_ends_the_completion_and_the_text_is_cut_behind_it(chain, make_request):
    decode = pieces("<answer", ">B</", "answ", "er> and", " more")
    completion = only_completion(new_engine(chain(), decode), make_request(stop=("</answer>",), max_tokens=20))
    assert completion.token_ids.tolist() == [2, 3, 4, 5]
    assert (completion.finish_reason, completion.text) == ("stop", "<answer>B</answer>")


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("zz", "cd"), "abcd", 2),
        (("e", "bcd"), "abcd", 2),
        (("d", "c"), "abc", 2),
        (("f", "abcdef"), "abcdef", 3),
        (("nowhere",), "abcdefgh", 4),
    ],
)
def test_the_first_of_several_stop_strings_counts(stop, text, tokens, chain, make_request):
    decode = pieces("ab", "cd", "ef", "gh")
    completion = only_completion(new_engine(chain(), decode), make_request(stop=stop, max_tokens=4))
    assert (completion.text, len(completion.token_ids)) == (text, tokens)
    assert completion.finish_reason == ("length" if stop == ("nowhere",) else "stop")


def test_a_stop_string_whose_characters_are_cut_into_bytes_is_found_late_in_a_completion(chain, make_request):
    ending = "é→🫁"
    decode = pieces(*(["x", "ü"] * 10), *(bytes([byte]) for byte in ending.encode()), "y")
    completion = only_completion(new_engine(chain(), decode), make_request(stop=(ending,), max_tokens=60))
    assert completion.text == "xü" * 10 + ending
    assert len(completion.token_ids) == 20 + len(ending.encode())


def test_a_long_piece_may_hold_the_stop_string_and_what_comes_after(chain, make_request):
    decode = pieces("a", "b</s>" + "c" * 50)
    completion = only_completion(new_engine(chain(), decode), make_request(stop=("</s>",), max_tokens=9))
    assert (completion.text, completion.token_ids.tolist()) == ("ab</s>", [2, 3])


def test_a_group_comes_out_in_the_step_in_which_its_last_completion_ends(chain, make_request, plan):
    engine = new_engine(chain({5: [0, 5]}), max_completions=32)
    for i in range(8):
        engine.submit(make_request(i, start=5, group_size=4, max_tokens=30))
    steps = 0
    while engine.busy:
        groups = engine.step()
        steps += 1
        for group in groups:
            assert max(len(completion.token_ids) for completion in group.completions) == steps - plan.lag
            assert len(group.completions) == 4
    assert steps > 3


def test_groups_come_out_in_order_of_completion_with_their_requests(chain, make_request):
    engine = new_engine(chain())
    requests = [make_request(i, max_tokens=max_tokens, group_size=2) for i, max_tokens in enumerate([9, 3, 6, 3])]
    for request in requests:
        engine.submit(request)
    groups = finish(engine)
    assert [group.request.index for group in groups] == [1, 3, 2, 0]
    assert all(group.request is requests[group.request.index] for group in groups)


def test_slots_are_filled_again_while_others_run(chain, make_request, plan):
    engine = new_engine(chain(), max_completions=3)
    for i, max_tokens in enumerate([20, 2, 2, 2, 2]):
        engine.submit(make_request(i, max_tokens=max_tokens))
    steps, order = 0, []
    while engine.busy:
        order += [group.request.index for group in engine.step()]
        steps += 1
    assert order == [1, 2, 3, 4, 0]
    # 20 tokens of the long one and one prefill step more, for the two that came later; a step more
    # before the host knows that rows are free
    assert steps == 21 + plan.lag


def test_completions_of_a_group_and_of_groups_differ_but_repeat_with_the_seed(chain, make_request):
    policy = chain({token: list(range(1, 60)) for token in range(64)})

    def run(*seeds):
        engine = new_engine(policy)
        for i, seed in enumerate(seeds):
            engine.submit(make_request(i, group_size=4, max_tokens=12, seed=seed))
        groups = sorted(finish(engine), key=lambda group: group.request.index)
        return [tuple(completion.token_ids) for group in groups for completion in group.completions]

    first = run(7, 8)
    assert len(set(first)) == 8
    assert run(8, 7) == first[4:] + first[:4]
    assert run(7) == first[:4]


def test_token_t_of_completion_i_is_drawn_with_number_t_of_stream_i(chain, make_request):
    # all of 1..60 are equally likely at every step, so the token tells which number was drawn
    engine = new_engine(chain({token: list(range(1, 61)) for token in range(64)}), max_completions=4)
    for i in range(3):
        engine.submit(make_request(i, group_size=2, max_tokens=5 + i, seed=100 + i))
    for group in finish(engine):
        sampling = group.request.sampling
        for seed, completion in zip(completion_seeds(sampling.seed, 2), group.completions, strict=True):
            numbers = uniforms(seed, torch.arange(sampling.max_tokens))
            assert completion.token_ids.tolist() == (1 + (60 * numbers).long()).tolist()


def test_logprobs_are_those_of_the_draw(chain, make_request):
    completion = only_completion(new_engine(chain({1: [7, 8, 9, 10], 11: [0]})), make_request(start=1))
    assert completion.rollout_logprobs[0] == pytest.approx(-math.log(4), abs=rounding(8))
    assert not completion.rollout_logprobs[1:].any()


def test_generated_tokens_are_counted(chain, make_request):
    engine = new_engine(chain())
    engine.submit(make_request(0, group_size=3, max_tokens=5))
    engine.submit(make_request(1, group_size=1, max_tokens=2))
    finish(engine)
    assert engine.generated_tokens == 17


def test_texts_so_far_grow_to_the_whole_ones_of_the_request_that_is_named(chain, make_request, plan):
    engine = new_engine(chain({4: [0], 9: [0]}))
    engine.submit(make_request(0, start=1))
    engine.submit(make_request(1, start=6, group_size=2))
    assert engine.partial_texts(1) == []
    seen, ended = [], {}
    while engine.busy:
        ended |= {group.request.index: group.completions[0].text for group in engine.step()}
        seen.append((engine.partial_texts(0), engine.partial_texts(1)))
    assert ended == {0: "cde", 1: "hij"}
    grown = [tuple(texts) for _, texts in seen if texts]
    assert [pair for i, pair in enumerate(grown) if pair != grown[i - 1]] == [
        *([("", "")] if plan.lag else []), ("h", "h"), ("hi", "hi"), ("hij", "hij")
    ]  # fmt: skip
    assert engine.partial_texts(0) == []


def test_abort_returns_the_unfinished_requests_and_leaves_a_usable_engine(chain, make_request, plan):
    engine = new_engine(chain(), max_completions=2)
    for i, max_tokens in enumerate([1, 9, 9, 9]):
        engine.submit(make_request(i, max_tokens=max_tokens))
    early = [group.request.index for _ in range(1 + plan.lag) for group in engine.step()]
    assert early == [0]
    engine.step()
    assert [request.index for request in engine.abort()] == [1, 2, 3]
    assert not engine.busy
    assert engine.abort() == []
    assert only_completion(engine, make_request(7, max_tokens=3)).token_ids.tolist() == [2, 3, 4]


@pytest.mark.parametrize("where", ["forward", "lay_out", "sample"])
def test_a_prompt_that_cannot_be_computed_leaves_nothing_behind(where, chain, make_request, monkeypatch):
    policy = chain()
    engine = new_engine(policy)
    engine.submit(make_request(1, max_tokens=9))
    engine.step()
    decoder = engine._decoder
    taken = [pool.pages - pool.free_pages for pool in (decoder.prefix, decoder.suffix)]
    target, name = {
        "forward": (type(policy), "hidden"), "lay_out": (type(decoder), "lay_out"), "sample": (type(decoder), "first"),
    }[where]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(target, name, fails)
        engine.submit(make_request(2, group_size=3, max_tokens=9))
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    assert [pool.pages - pool.free_pages for pool in (decoder.prefix, decoder.suffix)] == taken
    engine.submit(make_request(3, max_tokens=3))
    done = {group.request.index: group.completions[0].token_ids.tolist() for group in finish(engine)}
    assert done == {1: list(range(2, 11)), 3: [2, 3, 4]}


def fails(*_, **__):
    raise RuntimeError("out of memory")


def test_an_idle_engine_has_nothing_to_do(chain, make_request):
    engine = new_engine(chain())
    assert not engine.busy
    assert engine.step() == []
    only_completion(engine, make_request(max_tokens=2))
    assert engine.step() == []


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_the_cache_is_given_back_when_nothing_runs(end, chain, make_request, monkeypatch):
    caches = []

    class Watched(engine_module.Decoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(engine_module, "Decoder", Watched)
    engine = new_engine(chain())
    for _ in range(2):
        engine.submit(make_request(max_tokens=4))
        engine.step()
        assert caches[-1]() is not None
        finish(engine) if end == "finish" else engine.abort()
        gc.collect()
        assert caches[-1]() is None
    assert len(caches) == 2


def test_what_cannot_run_is_refused_at_once(chain, make_request):
    engine = new_engine(chain(), max_completions=4, max_prompt_tokens=10)
    for change, message in (
        ({"length": 11}, "11 tokens"),
        ({"group_size": 5}, "group_size 5"),
        ({"max_tokens": 0}, "max_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(make_request(**change))
    assert not engine.busy
