"""Which example comes next: modality shares, what is passed over, how long; same after a resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlmed.data.curriculum import Curriculum, next_turn
from rlmed.data.sampler import PromptOrder
from tests.configs import selection_config

MODALITIES = ["MRI"] * 5 + ["CT"] * 3 + ["X-ray"] * 4
MIX = {"MRI": 0.5, "CT": 0.3, "X-ray": 0.2}
PASS_RATE = selection_config("pass_rate")


def draw(curriculum: Curriculum, first: int, count: int, right: Callable[[int], int]) -> list[tuple[int, int]]:
    """Epoch and example of `count` requests, each observed with `right(example)` of 4 right."""
    places = []
    for index in range(first, first + count):
        visit = curriculum.visit(index)
        places.append((visit.epoch, visit.example))
        curriculum.observe(index, right(visit.example), 4)
    return places


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 300))
def test_nobody_is_a_whole_draw_away_from_its_share_at_any_time(shares: list[int], draws: int) -> None:
    drawn = [0] * len(shares)
    bound = 1 - 1 / (2 * len(shares) - 2) if len(shares) > 1 else 0
    for number in range(1, draws + 1):
        drawn[next_turn(shares, drawn)] += 1
        off = [abs(number * share / sum(shares) - count) for share, count in zip(shares, drawn, strict=True)]
        assert max(off) <= bound + 1e-9


def test_turns_worked_by_hand() -> None:
    # shares 1/2, 1/4, 1/4 of k = 3: eligible from a lack of 1/4 on, needed at a lack of 3/4
    drawn, turns = [0, 0, 0], []
    for _ in range(8):
        turns.append(next_turn([2, 1, 1], drawn))
        drawn[turns[-1]] += 1
    # draw 1: all lack enough (1/2, 1/4, 1/4); 3/4 is reached at 1.5 -> draw 2, 3, 3. Draw 2: lacks
    # 0, 1/2, 1/2; CT first. Draw 3: lacks 1/2, -1/4, 3/4: X-ray is due now and the first not before
    # draw 4. Draw 4: lacks 1, 0, 0.
    assert turns == [0, 1, 2, 0, 0, 1, 2, 0]


@given(st.integers(0, 1000), st.integers(1, 30))
def test_without_settings_it_is_the_plain_order(seed: int, rows: int) -> None:
    curriculum, order = Curriculum(["CT"] * rows, seed), PromptOrder(seed, rows)
    expected = [order.example_at(index) for index in range(2 * rows + 1)]
    assert draw(curriculum, 0, 2 * rows + 1, lambda _: 0) == expected


@given(st.integers(0, 1000))
def test_a_mix_has_its_shares_and_goes_through_all_rows_of_each_modality(seed: int) -> None:
    places = draw(Curriculum(MODALITIES, seed, mix=MIX), 0, 200, lambda _: 2)
    assert Counter(MODALITIES[example] for _, example in places) == {"MRI": 100, "CT": 60, "X-ray": 40}
    for step in range(0, 200, 10):
        counts = Counter(MODALITIES[example] for _, example in places[step : step + 10])
        assert all(abs(counts[name] - 10 * share) < 2 for name, share in MIX.items())
    for name in MIX:
        rows = [row for row, modality in enumerate(MODALITIES) if modality == name]
        drawn = [example for _, example in places if MODALITIES[example] == name]
        assert all(sorted(drawn[at : at + len(rows)]) == rows for at in range(0, len(drawn) - len(rows), len(rows)))


def test_shares_are_relative_and_other_modalities_are_left_out() -> None:
    places = draw(Curriculum(MODALITIES, 0, mix={"CT": 3, "X-ray": 1}), 0, 40, lambda _: 2)
    assert Counter(MODALITIES[example] for _, example in places) == {"CT": 30, "X-ray": 10}


def test_an_unknown_modality_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'Xray', .*'CT' \(3 rows\), 'MRI' \(5"):
        Curriculum(MODALITIES, 0, mix={"MRI": 1, "Xray": 1})
    with pytest.raises(ValueError, match=r"they have 'none' \(2 rows\)"):
        Curriculum(["", ""], 0, mix={"MRI": 1})


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_what_is_passed_over_and_for_how_long(seed: int, cooldown_epochs: int, window: int, right: list[int]) -> None:
    """Rows 0 or 4 of 4 right: `window` times, then once in `cooldown_epochs + 1`; others always."""
    selection = selection_config("pass_rate", window=window, cooldown_epochs=cooldown_epochs)
    places = draw(Curriculum(["CT"] * 6, seed, selection=selection), 0, 150, right.__getitem__)
    assert places == sorted(places, key=lambda visit: visit[0])
    last = places[-1][0]  # an epoch that may not be whole
    for row, count in enumerate(right):
        epochs = [epoch for epoch, example in places if example == row and epoch < last]
        sparse = [*range(window - 1), *range(window - 1, last, cooldown_epochs + 1)]
        expected = list(range(last)) if 0 < count < 4 else sparse
        assert epochs == [epoch for epoch in expected if epoch < last]


def test_bounds_are_those_of_the_latest_groups() -> None:
    selection = selection_config("pass_rate", window=2, min_pass_rate=0.25, max_pass_rate=0.75, cooldown_epochs=1)
    curriculum = Curriculum(["CT"], 0, selection=selection)
    aside = []
    for index, right in enumerate([4, 2, 3, 3, 1, 1]):  # rates of two: 0.75, 0.625, 0.75, 0.5, 0.25
        curriculum.visit(index)
        curriculum.observe(index, right, 4)
        metrics = curriculum.metrics()
        aside.append((metrics["prompts/too_easy"], metrics["prompts/too_hard"]))
        assert metrics["prompts/set_aside"] == sum(aside[-1])
    assert aside == [(0, 0), (1, 0), (0, 0), (1, 0), (0, 0), (0, 1)]


def test_what_is_learnt_comes_back() -> None:
    """A row that was too hard and now is half right is taken in each epoch again."""
    places, right = [], {0: 0, 1: 2}
    curriculum = Curriculum(["CT"] * 2, 0, selection=selection_config("pass_rate", cooldown_epochs=1))
    for index in range(20):
        places += draw(curriculum, index, 1, right.__getitem__)
        if places[-1][0] >= 3:
            right[0] = 2
    assert [epoch for epoch, example in places if example == 0][:6] == [0, 2, 4, 5, 6, 7]


@given(
    st.integers(0, 1000),
    st.sampled_from([None, MIX]),
    st.integers(1, 2),
    st.integers(0, 40),
    st.integers(0, 6),
    st.lists(st.sampled_from([0, 0, 2, 4]), min_size=100, max_size=100),
)
def test_a_restored_curriculum_goes_on_as_the_first_would_have(
    seed: int, mix: dict[str, float] | None, window: int, done: int, ahead: int, right: Sequence[int]
) -> None:
    """Also with requests under way, some perhaps observed late; the state goes through JSON."""

    def build() -> Curriculum:
        selection = selection_config("pass_rate", window=window)
        return Curriculum(MODALITIES, seed, mix=mix, selection=selection)

    def go_on(curriculum: Curriculum, start: int, stop: int) -> list[tuple[int, int]]:
        places = []
        for index in range(start, stop):
            curriculum.visit(index + ahead)
            visit = curriculum.visit(index)
            curriculum.observe(index, right[index], 4)
            places.append((visit.epoch, visit.example))
        return places

    first, second = build(), build()
    go_on(first, 0, done)
    second.restore(json.loads(json.dumps(first.state())))
    assert go_on(second, done, 90) == go_on(first, done, 90)
    assert second.state() == first.state()
    assert second.metrics() == first.metrics()


def test_a_place_is_the_same_until_it_is_observed() -> None:
    curriculum = Curriculum(MODALITIES, 0, selection=PASS_RATE)
    later, earlier = curriculum.visit(7), curriculum.visit(2)
    assert (curriculum.visit(7), curriculum.visit(2)) == (later, earlier)
    curriculum.observe(2, 0, 4)
    with pytest.raises(ValueError, match="request 2 was already observed"):
        curriculum.visit(2)
