"""The spool: whole lines or none, valid JSON for every float, torn and corrupt lines skipped and counted."""

import errno
import json
import logging
import math

import pytest

from common.tracking.spool import Sent, Spool, event_line, load_sent, metric_line, read_entries, save_sent


@pytest.fixture
def spool(tmp_path):
    made = Spool(tmp_path / "run")
    yield made
    made.close()


def _strict(line: bytes):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("value", [0.1, -3.0, 1e-300, math.inf, -math.inf, math.nan])
def test_each_value_is_valid_json_and_comes_back(spool, value):
    line = metric_line("celeba", "val_auc", value, 7, 1234)
    _strict(line)
    spool.append(line)
    entries, offset, corrupt = read_entries(spool.path, 0, 10)
    assert corrupt == 0
    assert offset == spool.size
    back = entries[0]
    assert back["value"] == value or (math.isnan(back["value"]) and math.isnan(value))
    assert (back["run"], back["key"], back["step"], back["time_ms"]) == ("celeba", "val_auc", 7, 1234)


def test_a_line_is_in_the_file_at_once(spool):
    spool.append(metric_line("", "loss", 1.0, 0, 1))
    assert spool.path.read_bytes().endswith(b"\n")
    assert spool.path.stat().st_size == spool.size


def test_lines_are_read_in_portions(spool):
    for step in range(5):
        spool.append(metric_line("", "loss", 1.0, step, 1))
    first, offset, _ = read_entries(spool.path, 0, 3)
    rest, end, _ = read_entries(spool.path, offset, 3)
    assert [entry["step"] for entry in first + rest] == [0, 1, 2, 3, 4]
    assert end == spool.size
    assert read_entries(spool.path, end, 3) == ([], end, 0)


@pytest.mark.parametrize(
    "line",
    [
        b"\x00\xff\n",
        b"{}\n",
        b"[1]\n",
        b'"text"\n',
        b'{"time_ms":1,"run":"","key":"a","value":"much","step":1}\n',
        b'{"time_ms":1,"run":3,"event":"start"}\n',
    ],
)
def test_a_corrupt_line_is_skipped_and_counted(spool, line):
    spool.append(metric_line("", "a", 1.0, 0, 1) + line + metric_line("", "a", 2.0, 1, 1))
    entries, offset, corrupt = read_entries(spool.path, 0, 10)
    assert [entry["value"] for entry in entries] == [1.0, 2.0]
    assert corrupt == 1
    assert offset == spool.size


def test_a_line_cut_short_by_a_kill_does_not_swallow_the_next(tmp_path):
    whole = metric_line("", "a", 1.0, 0, 1)
    (tmp_path / "spool.jsonl").write_bytes(whole + whole[: len(whole) // 2])
    assert len(read_entries(tmp_path / "spool.jsonl", 0, 10)[0]) == 1
    spool = Spool(tmp_path)
    spool.append(metric_line("", "a", 2.0, 1, 1))
    spool.close()
    entries, _, corrupt = read_entries(spool.path, 0, 10)
    assert [entry["value"] for entry in entries] == [1.0, 2.0]
    assert corrupt == 1


class FullDisk:
    """A file on a disk with room for a few bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path):
    path = tmp_path / "spool.jsonl"
    first, second = metric_line("", "a", 1.0, 0, 1), metric_line("", "a", 2.0, 1, 1)
    path.write_bytes(first + second[:20])
    entries, offset, corrupt = read_entries(path, 0, 10)
    assert ([entry["value"] for entry in entries], offset, corrupt) == ([1.0], len(first), 0)
    path.write_bytes(first + second)
    entries, offset, corrupt = read_entries(path, offset, 10)
    assert ([entry["value"] for entry in entries], offset, corrupt) == ([2.0], len(first + second), 0)


def test_a_full_disk_warns_once_and_the_spool_stays_readable(tmp_path, caplog):
    spool = Spool(tmp_path)
    spool.append(metric_line("", "a", 1.0, 0, 1))
    disk = FullDisk(spool._file, room=10)
    spool._file = disk
    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        spool.append(metric_line("", "a", 2.0, 1, 1))
        spool.append(metric_line("", "a", 3.0, 2, 1))
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    disk.room = 10_000
    spool.append(metric_line("", "a", 4.0, 3, 1))
    spool.close()
    entries, offset, corrupt = read_entries(spool.path, 0, 10)
    assert [entry["value"] for entry in entries] == [1.0, 4.0]
    assert corrupt == 1
    assert offset == spool.path.stat().st_size == spool.size


def test_a_closed_spool_takes_nothing(tmp_path):
    spool = Spool(tmp_path)
    spool.close()
    with pytest.raises(RuntimeError, match="closed"):
        spool.append(event_line("", "tags", 1, {"values": {}}))


def test_what_was_sent_is_known_for_the_same_server_only(tmp_path):
    sent = Sent(uri="http://a", offset=10, run_ids={"": "r1"}, nonfinite={"": ["loss"]})
    save_sent(tmp_path, sent)
    assert load_sent(tmp_path, "http://a") == sent
    elsewhere = load_sent(tmp_path, "http://b")
    assert (elsewhere.offset, elsewhere.run_ids, elsewhere.nonfinite) == (0, {}, {})
    assert elsewhere.run_key == sent.run_key


def test_a_damaged_note_of_what_was_sent_means_nothing_was(tmp_path):
    (tmp_path / "spool.sent.json").write_text('{"offset": 10, "uri": "http://a", "wor', encoding="utf-8")
    assert load_sent(tmp_path, "http://a").offset == 0
