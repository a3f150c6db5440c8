"""Orders: a permutation in each epoch, reached from a cursor alone, the same in every process."""

import math
import subprocess
import sys
from collections import Counter

import pytest

from rlmed.core.types import Example
from rlmed.data.sampler import PromptOrder, reorder_options, shuffle_options

EXAMPLE = Example(id="q1", image=None, question="Which?", options=("head", "chest", "abdomen", "knee"), answer=3)


def test_each_epoch_is_another_permutation():
    order = PromptOrder(seed=3, examples=50)
    stream = [order.example_at(cursor) for cursor in range(150)]
    assert [epoch for epoch, _ in stream] == [0] * 50 + [1] * 50 + [2] * 50
    epochs = [tuple(index for _, index in stream[start : start + 50]) for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({*epochs, tuple(range(50))}) == 4


def test_any_cursor_in_any_order_gives_the_same():
    forward = PromptOrder(seed=3, examples=7)
    expected = [forward.example_at(cursor) for cursor in range(40)]
    backward = PromptOrder(seed=3, examples=7)
    assert [backward.example_at(cursor) for cursor in reversed(range(40))] == expected[::-1]
    assert PromptOrder(seed=3, examples=7).example_at(39) == expected[39]


def test_seeds_differ():
    streams = {tuple(PromptOrder(seed, 30).example_at(cursor)[1] for cursor in range(30)) for seed in range(20)}
    assert len(streams) == 20


def test_a_single_example_and_impossible_arguments():
    assert [PromptOrder(0, 1).example_at(cursor) for cursor in range(3)] == [(0, 0), (1, 0), (2, 0)]
    with pytest.raises(ValueError, match="no examples"):
        PromptOrder(0, 0)
    with pytest.raises(ValueError, match="cursor=-1"):
        PromptOrder(0, 3).example_at(-1)


@pytest.mark.parametrize("seed", range(20))
def test_the_correct_answer_follows_its_option(seed):
    shuffled = shuffle_options(EXAMPLE, seed)
    assert shuffled.options[shuffled.answer] == "knee"
    assert sorted(shuffled.options) == sorted(EXAMPLE.options)
    assert (shuffled.id, shuffled.question) == (EXAMPLE.id, EXAMPLE.question)


def test_the_correct_letter_is_distributed_evenly_over_seeds_and_over_ids():
    by_seed = [shuffle_options(EXAMPLE, seed).answer for seed in range(400)]
    by_id = [shuffle_options(Example(f"q{n}", None, "?", EXAMPLE.options, 3), 0).answer for n in range(400)]
    for answers in (by_seed, by_id):
        # 100 expected of each; 60 is more than four standard deviations away
        assert all(60 < answers.count(letter) < 140 for letter in range(4))


def test_the_order_is_the_same_in_another_process():
    code = (
        "from rlmed.core.types import Example; from rlmed.data.sampler import shuffle_options, PromptOrder;"
        "print(shuffle_options(Example('q1', None, '?', ('head','chest','abdomen','knee'), 3), 5).options,"
        "[PromptOrder(5, 9).example_at(c)[1] for c in range(9)])"
    )
    environment = {"PYTHONHASHSEED": "123", "PYTHONPATH": ":".join(sys.path)}
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    expected = (shuffle_options(EXAMPLE, 5).options, [PromptOrder(5, 9).example_at(cursor)[1] for cursor in range(9)])
    assert output.stdout.strip() == f"{expected[0]} {expected[1]}"


def test_a_written_completion_is_left_out_of_another_order():
    example = Example("q1", None, "?", ("a", "b"), 0, completion="<think>t</think><answer>A</answer>")
    shuffled = [shuffle_options(example, seed) for seed in range(20)]
    assert {(entry.options[entry.answer], entry.completion) for entry in shuffled} == {("a", None)}
    assert {entry.letter for entry in shuffled} == {"A", "B"}


@pytest.mark.parametrize("options", [("head", "knee"), ("head", "chest", "abdomen", "knee")])
def test_another_order_is_never_the_own_one_and_else_any(options):
    orders = Counter()
    for seed in range(300):
        example = Example("q1", None, "?", options, 1, completion="<think>t</think><answer>B</answer>")
        other = reorder_options(example, 1000 * seed)
        assert other.options[other.answer] == options[1]
        assert other.completion is None
        orders[other.options] += 1
    assert options not in orders
    assert len(orders) == math.factorial(len(options)) - 1


@pytest.mark.parametrize("last", ["all of the above", "A and C", "both", "None of these", "neither", "A, B", "beide"])
def test_a_row_whose_options_refer_to_others_keeps_their_order(last):
    options = ("head", "chest", "abdomen", last)
    example = Example("q1", None, "?", options, 3)
    assert {shuffle_options(example, seed) for seed in range(50)} == {example}
    assert reorder_options(example, 0) is None
    assert reorder_options(Example("q1", None, "?", ("head", last), 0), 0) is None


def test_texts_that_only_look_as_if_they_referred_to_others_are_shuffled():
    example = Example("q1", None, "?", ("both lungs", "hepatitis A", "above the diaphragm", "E. coli"), 0)
    assert len({shuffle_options(example, seed).options for seed in range(400)}) == 24
