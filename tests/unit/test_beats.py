"""What leaves a site while it works: shares and seconds, made of what its trainer tells, and never counts."""

import json
import re
import time
from types import SimpleNamespace

import pytest

from common.errors import ReplyRefused
from common.protocol.beats import NOT_COUNTED, UNKNOWN, WORKING, Beat, beat_of, read_beat
from common.system import progress
from common.system.progress import PACKING, SCORING, Amount, Meter, read_amounts, tell_into, telling

NOW = 5000.0


@pytest.fixture
def told(tmp_path):
    """told(amount's fields, moved_at) -> the beat that comes of it."""

    def come_to(*, moved_at=NOW - 7.5, **values):
        amount = {"done": 310, "total": 1000, "seconds": 100.0, "work": PACKING} | values
        (tmp_path / "p").write_text(json.dumps(amount | {"time": moved_at}))
        return beat_of(tmp_path / "p", "celeba", now=lambda: NOW)

    return come_to


def test_a_share_the_time_left_and_how_long_nothing_moved(told):
    said = told()
    assert (said.client, said.work, said.percent, said.left_s, said.still_s) == ("celeba", PACKING, 31, 220.0, 7.0)
    assert said.words() == "packing 31 %, 4 min left"


def test_what_was_done_before_makes_no_rate(told):
    """A pack that goes on at 300 of 1,000: 10 pictures in 100 s, so 6,900 s are left and not 220."""
    assert told(before=300).left_s == 6900.0


def test_no_count_leaves(told):
    """The time left has two digits, so 1,234,567 pictures at 345.67 a second do not come of it."""
    said = told(done=234_567, total=1_234_567, seconds=678.9)
    assert re.fullmatch(r"[1-9]\d0*\.0", str(said.left_s))
    assert set(said.values()) == {"client", "work", "percent", "left_s", "still_s"}


def test_before_the_pictures_are_counted_it_says_so_and_how_long(told):
    said = told(done=0, total=0, moved_at=NOW - 40.0)
    assert (said.percent, said.still_s, said.words()) == (NOT_COUNTED, 40.0, "packing: counting the pictures")


def test_what_follows_the_last_picture_is_not_told_of(told):
    """Pairs are scored after the last picture was embedded; that is no standing still."""
    said = told(done=1000, work=SCORING, moved_at=NOW - 900.0)
    assert (said.percent, said.left_s, said.still_s, said.words()) == (100, UNKNOWN, UNKNOWN, "scoring 100 %")


def test_without_a_file_it_is_at_work_and_no_more(tmp_path):
    said = beat_of(tmp_path / "none", "celeba")
    assert (said.work, said.still_s, said.words()) == (WORKING, UNKNOWN, "is at work")


def test_a_frozen_trainer_stands_still_however_old_its_word_is(told):
    assert told(moved_at=NOW - 4000.0).still_s == 4000.0


@pytest.mark.parametrize("percent", [NOT_COUNTED, 0, 100])
def test_what_is_read_is_what_was_said(percent):
    said = Beat(client="celeba", work=PACKING, percent=percent, left_s=40.0, still_s=0.0)
    assert read_beat(said.values()) == said


@pytest.mark.parametrize(
    "values",
    [{"percent": -2}, {"percent": 50.0}, {"percent": True}, {"left_s": 1e9}, {"still_s": 3}, {"work": ""}, {"more": 1}],
)
def test_what_no_site_of_ours_says_is_refused(values):
    with pytest.raises(ReplyRefused, match="a beat is malformed"):
        read_beat(Beat(client="celeba").values() | values)


# ---- how the trainer's word comes about


def test_a_meter_that_is_told_how_far_it_is_moves_when_that_does(monkeypatch):
    """Who waits for another program's packing hears the same number each second."""
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    now, shown = [0.0], []
    meter = Meter(0, shown.append, clock=lambda: now[0], every_s=0.0)
    for now[0], done in ((1.0, 300), (2.0, 300), (3.0, 310), (4.0, 310)):
        meter.reach(done, 1000)
    assert [(one.done, one.before, one.seconds) for one in shown] == [(300, 300, 1.0), (310, 300, 3.0)]
    assert shown[-1].rate == pytest.approx(10 / 3)


def test_a_site_tells_of_its_packing(tmp_path, monkeypatch):
    """From the first moment, when nothing is counted; with `open_pack`'s own numbers; and nothing afterwards."""
    from clients import packs
    from clients.site import SiteSettings
    from common.settings import DataSettings

    seen = []

    def look():
        seen.extend((one.label, one.who, one.done, one.total) for one in read_amounts(tmp_path / "p"))

    def open_pack(*_, progress, **__):
        look()
        progress(64, 128)
        look()
        return SimpleNamespace(key="the pack's")

    monkeypatch.setattr(packs, "open_pack", open_pack)
    tell_into(tmp_path / "p")
    site = SiteSettings(
        name="celeba", dataset="folder", data_dir=tmp_path, device="cpu", state_dir=tmp_path, cache_dir=tmp_path
    )
    try:
        assert packs.open_site_pack(site, DataSettings()).key == "the pack's"
    finally:
        tell_into(None)
    assert seen == [("packing", "celeba", 0, 0), ("packing", "celeba", 64, 128)]
    assert read_amounts(tmp_path / "p") == []


def test_labels_say_what_is_done():
    labels = [Amount(done=1, total=2, seconds=1.0, server_round=3, work=work).label for work in progress.WORKS]
    assert labels == ["packing", "round 3, scoring", "round 3, warming up", "round 3"]


def test_what_is_told_moves_with_the_work_and_not_with_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    tell_into(tmp_path / "p")
    try:
        with telling(10, who="a", run="r", server_round=1) as tick:
            began = time.time()
            _, before = progress.read_amount(tmp_path / "p")
            monkeypatch.setattr(tick, "_every_s", 0.0)
            tick(5)
            amount, moved = progress.read_amount(tmp_path / "p")
            assert (amount.done, before <= began <= moved) == (5, True)
    finally:
        tell_into(None)
