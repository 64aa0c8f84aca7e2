"""How far a piece of work is: counted where it is done, told twice a second, read by another process."""

import json
import time

import pytest

from common.system import progress
from common.system.live import amount_words, clock_text
from common.system.progress import Amount, Meter, added, read_amounts, tell_into, telling


@pytest.fixture(autouse=True)
def _nowhere():
    yield
    tell_into(None)


def test_words_have_pictures_rate_and_time_left():
    begun = Amount(done=1240, total=5600, seconds=2.0)
    assert amount_words(begun) == "1,240 of 5,600 pictures, 620 a second, 0:07 left"
    assert amount_words(Amount(done=3, total=6, seconds=2.0)) == "3 of 6 pictures, 1.5 a second, 0:02 left"
    assert amount_words(Amount(done=0, total=6, seconds=0.0)) == "0 of 6 pictures"
    assert [clock_text(seconds) for seconds in (0.4, 7, 750, 3723)] == ["0:00", "0:07", "12:30", "1:02:03"]


def test_a_meter_shows_at_most_twice_a_second():
    now, shown = [100.0], []
    meter = Meter(300, shown.append, clock=lambda: now[0])
    for _ in range(10):
        now[0] += 0.2
        meter(30)
    assert [amount.done for amount in shown] == [90, 180, 270]
    assert [round(amount.seconds, 6) for amount in shown] == [0.6, 1.2, 1.8]


def test_what_several_do_at_once_is_added():
    both = added([Amount(done=10, total=20, seconds=4.0), Amount(done=5, total=30, seconds=5.0)], done=100, total=150)
    assert (both.done, both.total, both.seconds, both.rate) == (115, 150, 5.0, 23.0)


def test_another_process_reads_what_is_told_while_the_work_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    tell_into(tmp_path / "1.json")
    with telling(64, who="alpha", run="r", server_round=3) as tick:
        [begun] = read_amounts(tmp_path)
        assert (begun.done, begun.total, begun.who, begun.run, begun.server_round) == (0, 64, "alpha", "r", 3)
        assert (tmp_path / "1.json").stat().st_mode & 0o777 == 0o600
        monkeypatch.setattr(tick, "_shown", -1e9)
        tick(32)
        assert [amount.done for amount in read_amounts(tmp_path / "1.json")] == [32]
    assert read_amounts(tmp_path) == []


def test_nobody_is_told_where_nobody_asked_or_the_folder_is_not_here(tmp_path):
    for place in (None, tmp_path / "of another machine" / "1.json"):
        tell_into(place)
        with telling(64, who="a", run="r", server_round=1) as tick:
            tick(32)
    assert list(tmp_path.iterdir()) == []


def test_what_is_old_or_damaged_is_left_out(tmp_path):
    whole = {"done": 1, "total": 2, "seconds": 3.0, "who": "", "run": "", "server_round": 1, "time": time.time()}
    for name, text in {
        "old": json.dumps(whole | {"time": time.time() - progress.STALE_S - 1}),
        "cut": json.dumps(whole)[:-9],
        "other": json.dumps(whole | {"x": 1}),
        "list": "[]",
        "good": json.dumps(whole),
    }.items():
        (tmp_path / name).write_text(text)
    assert len(read_amounts(tmp_path)) == 1
    assert read_amounts(tmp_path / "nowhere") == []
