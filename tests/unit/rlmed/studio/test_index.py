import contextlib
import json
import os
import sqlite3
import stat
import threading

import pytest

from rlmed.studio import index as index_module
from rlmed.studio.index import FORMAT, Index
from rlmed.studio.indexing import KEPT_DAYS, Indexing, remove_old
from rlmed.studio.query import PAGE, Filters, kinds, of_prompt, search
from tests.unit.rlmed.report.test_page import line, write_lines


@pytest.fixture
def rollouts(tmp_path):
    """Six groups of two completions: rewards 2 and 0, and in step 6 none and 1."""
    path = tmp_path / "rollouts.jsonl"
    groups = [line(step=step, index=step, question=f"Which lobe {'α' * step}?") for step in range(1, 6)]
    groups.append(
        line(step=6, index=1, example_id="ex-1", question="Which lobe α?", rewards=(None, 1.0), texts=("Éclair", "x"))
    )
    write_lines(path, groups)
    return path


@pytest.fixture
def index(rollouts, tmp_path):
    return Index(rollouts, tmp_path / "cache")


def fill(index):
    with index.open() as connection:
        while index.update(connection):
            pass
        return index.place(connection)


def found(index, **given):
    """Steps and positions of the page's completions, and how many fit."""
    with index.open() as connection:
        total, hits = search(connection, Filters.read({name: str(value) for name, value in given.items()}))
        steps = [connection.execute("SELECT step FROM rollouts WHERE id = ?", (hit.id,)).fetchone()[0] for hit in hits]
        return total, [(step, hit.position) for step, hit in zip(steps, hits, strict=True)]


def everything(index):
    with index.open() as connection:
        tables = [connection.execute(f"SELECT * FROM {name}").fetchall() for name in ("groups", "rollouts")]
        words = connection.execute("SELECT rowid FROM texts WHERE texts MATCH 'which'").fetchall()
    return tables, words


def test_filters_are_joined_by_and(index):
    fill(index)
    assert found(index)[0] == 12
    assert found(index, step_from=2, step_to=3, sort="oldest") == (4, [(2, 0), (2, 1), (3, 0), (3, 1)])
    assert found(index, reward_from=1, reward_to=1) == (1, [(6, 1)])
    assert found(index, words="bright", step_from=5) == (1, [(5, 0)])
    assert found(index, task="choice", modality="MRI")[0] == 12
    assert found(index, modality="CT") == (0, [])


@pytest.mark.parametrize(
    ("words", "total"),
    [
        ("lobe BRIGHT", 5),
        ("bri", 5),
        ("eclair", 1),
        ("αα", 8),
        ("lobe nowhere", 0),
        ('" OR lobe', 0),
        ("NEAR(", 0),
        ("(* ^ -", 0),
        ("E\u0301clair", 1),
        ("e", 0),
        ("x", 1),
        ("text:", 0),
        ("'; DROP TABLE rollouts", 0),
        ("head knee", 12),
    ],
)
def test_words_are_beginnings_of_words_of_question_options_and_completion(index, words, total):
    fill(index)
    assert found(index, words=words)[0] == total
    assert found(index)[0] == 12


def test_orders(index):
    fill(index)
    assert found(index)[1][:3] == [(6, 1), (6, 0), (5, 1)]
    assert found(index, sort="best")[1][0] == (5, 0)
    assert found(index, sort="worst")[1][0] == (1, 1)
    assert found(index, sort="worst")[1][-1] == (6, 0)  # without a reward
    assert found(index, sort="no order")[1] == found(index)[1]


def test_pages_hold_twenty_and_a_page_beyond_the_last_is_the_last(index, rollouts):
    write_lines(rollouts, [line(step=step) for step in range(1, 22)])
    fill(index)
    assert [len(found(index, page=page, sort="oldest")[1]) for page in (0, 1, 2, 3, 99)] == [PAGE, PAGE, PAGE, 2, 2]
    assert found(index, page=99, sort="oldest")[1] == [(21, 0), (21, 1)]


def test_a_prompt_is_followed_over_training(index):
    fill(index)
    with index.open() as connection:
        prompt = connection.execute("SELECT prompt FROM groups WHERE step = 1").fetchone()[0]
        assert of_prompt(connection, prompt) == [(1, 1.0), (6, 1.0)]
        assert kinds(connection) == (["choice"], ["MRI"])
    assert found(index, prompt=prompt) == (4, [(1, 0), (1, 1), (6, 0), (6, 1)])


def test_numbers_that_are_none_filter_nothing():
    given = {"step_from": "x", "step_to": "9" * 30, "reward_from": "nan", "reward_to": "1e999", "page": "-3"}
    assert Filters.read(given) == Filters()
    assert Filters.read({}).query() == ""


@pytest.mark.parametrize("batch", [1, 300, 2**20])
def test_the_index_is_the_same_however_much_is_read_at_a_time(index, rollouts, tmp_path, monkeypatch, batch):
    fill(index)
    monkeypatch.setattr(index_module, "BATCH", batch)
    other = Index(rollouts, tmp_path / "other")
    assert fill(other).lines == 6
    assert everything(other) == everything(index)


def test_lines_that_are_appended_are_added(index, rollouts, tmp_path):
    lines = rollouts.read_bytes().splitlines(keepends=True)
    rollouts.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    place = fill(index)
    assert (place.lines, place.offset) == (3, len(b"".join(lines[:3])))
    with rollouts.open("ab") as file:
        file.write(lines[3][40:] + b"".join(lines[4:]))
    assert fill(index).lines == 6
    whole = Index(rollouts, tmp_path / "other")
    fill(whole)
    assert everything(index) == everything(whole)


@pytest.mark.parametrize("kept", [0, 2, 5])
def test_a_truncated_file_that_has_grown_again_is_read_anew(index, rollouts, tmp_path, kept):
    fill(index)
    lines = rollouts.read_bytes().splitlines(keepends=True)
    with rollouts.open("r+b") as file:  # as a resumed run does: the same file
        file.truncate(len(b"".join(lines[:kept])))
    with rollouts.open("a") as file:
        file.write("".join(json.dumps(line(step=step, modality="CT")) + "\n" for step in range(kept + 1, 9)))
    assert fill(index).lines == 8
    whole = Index(rollouts, tmp_path / "other")
    fill(whole)
    assert everything(index) == everything(whole)
    assert found(index, modality="CT")[0] == 2 * (8 - kept)


def test_a_file_that_is_shorter_now_is_read_anew(index, rollouts):
    fill(index)
    os.truncate(rollouts, len(rollouts.read_bytes().splitlines(keepends=True)[0]))
    assert fill(index).lines == 1
    assert found(index) == (2, [(1, 1), (1, 0)])


def test_another_file_of_this_name_is_read_anew(index, rollouts, tmp_path):
    fill(index)
    write_lines(tmp_path / "new", [line(step=1)] * 20)
    (tmp_path / "new").rename(rollouts)
    assert fill(index).lines == 20


@pytest.mark.parametrize(
    "damaged",
    [
        b"not JSON\n",
        b"\xff\n",
        b"[]\n",
        b"{}\n",
        b"\n",
        b'{"step": 1e400}\n',
        b"[" * 5000 + b"\n",
        json.dumps(line(step=2**70)).encode() + b"\n",
        json.dumps(line(completions=5)).encode() + b"\n",
        json.dumps(line(options=None)).encode() + b"\n",
    ],
)
def test_damaged_lines_are_left_out_and_counted(index, rollouts, damaged):
    content = rollouts.read_bytes()
    rollouts.write_bytes(damaged + content)
    place = fill(index)
    assert (place.lines, place.damaged) == (7, 1)
    assert found(index, sort="oldest", step_to=1) == (2, [(1, 0), (1, 1)])


def test_a_damaged_index_starts_anew(index):
    fill(index)
    index.path.write_bytes(b"no database" * 1000)
    assert fill(index).lines == 6
    assert found(index)[0] == 12


def damage(index):
    """Write over all but the first pages, which connecting reads."""
    with index.path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(4 * 4096)
        file.write(b"damage" * (size // 6))


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_index_with_damage_inside_starts_anew_while_it_is_filled_and_asked(rollouts, tmp_path):
    indexing = Indexing(tmp_path / "cache")
    index = indexing.index(rollouts)
    assert fill(index).lines == 6
    damage(index)
    with pytest.raises(sqlite3.DatabaseError, match="malformed"), index.open() as connection:
        search(connection, Filters())
    fill(index)
    damage(index)

    def ask(index, connection):
        while index.update(connection):
            pass
        return search(connection, Filters())[0]

    assert indexing.use(rollouts, ask) == 12
    assert fill(index).lines == 6


def test_an_index_that_cannot_be_reached_is_kept(index):
    fill(index)
    content = index.path.read_bytes()
    beside = index.path.with_name(f"{index.path.name}-wal")
    beside.mkdir()
    with pytest.raises(sqlite3.OperationalError), index.open():
        pass
    beside.rmdir()
    assert index.path.read_bytes() == content
    assert found(index)[0] == 12


def test_a_file_that_begins_otherwise_is_read_anew(index, rollouts, monkeypatch):
    monkeypatch.setattr(index_module, "SEAM", 100)
    fill(index)
    with rollouts.open("r+b") as file:
        first = file.readline()
        file.seek(0)
        file.write(b"?" * (len(first) - 1))
    assert fill(index).damaged == 1
    assert found(index)[0] == 10


@pytest.mark.parametrize(
    ("words", "total"),
    [
        ("结节", 1),
        ("右肺上叶", 1),
        ("叶结", 0),
        ("节结", 0),
        ("结节 右肺", 1),
        ("5mm结节", 1),
        ("陰影", 1),
        ("カメ", 1),
        ("影が", 1),
        ("メラ", 1),
        ("lobe 结节", 1),
    ],
)
def test_chinese_and_japanese_are_found_anywhere(index, rollouts, words, total):
    texts = ("胸部CT显示右肺上叶有一个5mm结节。lobe", "左肺に陰影がある。カメラ")
    write_lines(rollouts, [line(step=1, texts=texts), line(step=2)])
    fill(index)
    assert found(index, words=words)[0] == total
    assert found(index, words=words, step_from=2)[0] == 0


def test_a_syllable_of_korean_is_the_beginning_of_a_word(index, rollouts):
    write_lines(rollouts, [line(step=1, texts=("폐에 결절이 있습니까", "a lung")), line(step=2)])
    fill(index)
    assert [found(index, words=words)[0] for words in ("폐", "결", "절", "l", "a")] == [1, 1, 0, 0, 1]


def test_the_index_is_for_this_user_alone_and_outside_of_the_run(index, rollouts, tmp_path):
    before = sorted(rollouts.parent.iterdir())
    fill(index)
    assert sorted(rollouts.parent.iterdir()) == before
    assert stat.S_IMODE(index.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(index.path.parent.stat().st_mode) == 0o700
    assert index.path.parent == tmp_path / "cache"


def test_several_threads_fill_one_index_once(index, rollouts, monkeypatch):
    monkeypatch.setattr(index_module, "BATCH", 300)
    with contextlib.closing(sqlite3.connect(":memory:")):
        threads = [threading.Thread(target=fill, args=(Index(rollouts, index.path.parent),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found(index)[0] == 12


def test_indexing_keeps_an_index_up_to_date(rollouts, tmp_path):
    indexing = Indexing(tmp_path / "cache")
    assert found(indexing.index(rollouts))[0] == 12
    with rollouts.open("a") as file:
        file.write(json.dumps(line(step=7)) + "\n")
    assert found(indexing.index(rollouts))[0] == 14


def test_indexes_that_nobody_opens_are_removed(tmp_path):
    old, young = (tmp_path / f"{letter * 32}-{FORMAT}.sqlite3" for letter in "ab")
    others = tmp_path / "my_patients.sqlite3"
    for path, days in ((old, KEPT_DAYS + 1), (young, KEPT_DAYS - 1), (others, KEPT_DAYS + 1)):
        path.write_text("")
        moment = path.stat().st_mtime - days * 86400
        os.utime(path, (moment, moment))
    beside = [old.with_name(f"{old.name}{suffix}") for suffix in ("-wal", "-shm")]
    for path in beside:
        path.write_text("")
    remove_old(tmp_path)
    assert (old.exists(), young.exists(), others.exists()) == (False, True, True)
    assert not any(path.exists() for path in beside)


def test_an_index_that_is_only_read_counts_as_opened(index):
    fill(index)
    moment = index.path.stat().st_mtime - (KEPT_DAYS + 1) * 86400
    os.utime(index.path, (moment, moment))
    assert found(index)[0] == 12
    remove_old(index.path.parent)
    assert index.path.exists()
