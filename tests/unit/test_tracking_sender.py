"""The sending thread against servers that are away, frozen, slow or take no files: nothing lost, nobody waits."""

import logging
import threading
import time

import pytest

from common.tracking import sender as sender_module
from common.tracking.sender import Sender
from common.tracking.spool import Sent, Spool, event_line, load_sent, metric_line

URI = "http://me:secret@server:5000"


class FakeServer:
    """Takes entries, or raises while it is down, or hangs while it is frozen; refuses some files."""

    def __init__(self):
        self.steps = []
        self.files = []
        self.refused = set()
        self.tried = []  # files, taken or not
        self.attempts = 0
        self.down = False
        self.thaw = threading.Event()
        self.thaw.set()

    def connect(self):
        if self.down:
            self.attempts += 1
            raise ConnectionError(f"{URI} refused\nand more lines")
        return self

    def send(self, entries):
        self.attempts += 1
        self.thaw.wait()
        if self.down:
            raise ConnectionError(f"{URI} refused\nand more lines")
        self.steps += [entry["step"] for entry in entries if "step" in entry]
        for entry in entries:
            if entry.get("event") == "artifact":
                self.tried.append(entry["name"])
                if entry["name"] in self.refused:
                    raise ValueError("the store is full")
                self.files.append(entry["name"])

    def check(self):
        self.thaw.wait()
        if self.down:
            raise ConnectionError(f"{URI} refused\nand more lines")


@pytest.fixture
def server():
    made = FakeServer()
    yield made
    made.thaw.set()


@pytest.fixture
def started(tmp_path, server, monkeypatch):
    monkeypatch.setattr(sender_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(sender_module, "RETRY_FIRST_S", 0.02)
    spool = Spool(tmp_path)
    sender = Sender(spool, Sent(uri=URI), server.connect, URI)
    sender.start()
    yield spool, sender
    server.thaw.set()
    sender.close(5.0)
    spool.close()


def _log(spool, sender, steps):
    for step in steps:
        spool.append(metric_line("", "a", 1.0, step, 1))
        sender.wake()


def _files(spool, sender, *names):
    spool.append(b"".join(event_line("", "artifact", 1, {"file": name, "name": name}) for name in names))
    sender.wake()


def _wait(condition):
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_everything_arrives_once_and_in_order(started, server):
    spool, sender = started
    _log(spool, sender, range(5000))
    assert sender.flush(10.0)
    assert server.steps == list(range(5000))
    assert sender.backlog() == (0, 0, 0)


def test_a_server_that_is_down_gets_the_rest_later_with_two_lines_of_log(started, server, caplog):
    spool, sender = started
    with caplog.at_level(logging.INFO, logger="facefed.tracking"):
        server.down = True
        _log(spool, sender, range(10))
        _wait(lambda: server.attempts >= 4)
        server.down = False
        assert sender.flush(10.0)
    assert server.steps == list(range(10))
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "refused" in caplog.messages[0]
    assert "again" in caplog.messages[1]
    assert "secret" not in caplog.text
    assert "more lines" not in caplog.text


def test_flush_gives_up_soon_when_the_server_is_down(started, server):
    spool, sender = started
    server.down = True
    _log(spool, sender, range(3))
    begun = time.monotonic()
    assert not sender.flush(30.0)
    assert time.monotonic() - begun < 20.0


def test_closing_waits_no_longer_than_it_may_for_a_frozen_server(started, server, caplog):
    spool, sender = started
    server.thaw.clear()
    _log(spool, sender, range(3))
    begun = time.monotonic()
    assert not sender.close(0.3)
    assert 0.2 < time.monotonic() - begun < 20.0
    assert sender.backlog().num_records == 3
    server.down = True
    server.thaw.set()
    sender._thread.join(10.0)
    assert not caplog.records  # nothing is said behind the program's last line


def test_a_log_call_stays_quick_while_the_server_is_frozen(started, server):
    spool, sender = started
    server.thaw.clear()
    percentiles = []
    for first in range(0, 3000, 1000):  # three tries: other programs may hold the processor during one
        costs = []
        for step in range(first, first + 1000):
            begun = time.perf_counter()
            _log(spool, sender, [step])
            costs.append(time.perf_counter() - begun)
        percentiles.append(sorted(costs)[990])
    assert min(percentiles) < 1e-3
    server.thaw.set()
    assert sender.flush(10.0)
    assert server.steps == list(range(3000))


def test_closing_tries_a_last_time_during_a_long_wait(tmp_path, server, monkeypatch):
    monkeypatch.setattr(sender_module, "RETRY_FIRST_S", 60.0)
    spool = Spool(tmp_path)
    sender = Sender(spool, Sent(uri=URI), server.connect, URI)
    server.down = True
    sender.start()
    _log(spool, sender, range(3))
    _wait(lambda: server.attempts)
    server.down = False
    assert sender.close(10.0)
    assert server.steps == [0, 1, 2]
    spool.close()


def test_a_second_process_goes_on_where_the_first_stopped(tmp_path, server):
    for steps in (range(3), range(3, 6)):
        spool = Spool(tmp_path)
        sender = Sender(spool, load_sent(tmp_path, "http://a"), server.connect, "http://a")
        sender.start()
        _log(spool, sender, steps)
        assert sender.close(10.0)
        spool.close()
    assert server.steps == list(range(6))


def test_corrupt_lines_are_reported_and_passed(started, server, caplog):
    spool, sender = started
    with caplog.at_level(logging.WARNING, logger="facefed.tracking"):
        spool.append(b"nonsense\n")
        _log(spool, sender, [1])
        assert sender.flush(10.0)
    assert server.steps == [1]
    assert "1 corrupt" in caplog.text


def test_files_that_are_refused_wait_while_metrics_go_on(started, server, caplog):
    spool, sender = started
    server.refused = {"a.png", "b.png"}
    with caplog.at_level(logging.INFO, logger="facefed.tracking"):
        _files(spool, sender, "a.png", "b.png", "c.png")
        _log(spool, sender, range(100))
        _wait(lambda: server.steps == list(range(100)))
        _wait(lambda: server.files == ["c.png"])
        noted = load_sent(spool.path.parent, URI)
        assert [spool.path.read_bytes()[begin:].partition(b"\n")[0].count(b".png") for begin in noted.aside] == [2, 2]
        assert sender.backlog()[:2] == (0, 2)
        assert not sender.flush(10.0)
        _log(spool, sender, range(100, 110))
        _wait(lambda: server.steps == list(range(110)))
        server.refused = set()
        _wait(lambda: sender.flush(5.0))
    assert server.files == ["c.png", "a.png", "b.png"]
    assert server.steps == list(range(110))
    assert sender.backlog() == (0, 0, 0)
    refused, again = caplog.messages
    assert "takes records, but 3 of the run's files not now (the store is full)" in refused
    assert "takes files again" in again
    assert "secret" not in caplog.text


def test_after_a_refused_file_the_metrics_come_before_the_next(started, server):
    """Each may take minutes to fail: in one attempt only one is tried before what stands behind it."""
    spool, sender = started
    server.refused = {"a.png", "b.png"}
    server.thaw.clear()
    _files(spool, sender, "a.png", "b.png")
    _log(spool, sender, [1])
    told = []
    server.steps = told
    real = server.send
    server.send = lambda entries: (told.append(list(server.tried)) if "step" in entries[0] else None, real(entries))
    server.thaw.set()
    _wait(lambda: 1 in told)
    assert told[0] == ["a.png"]


def test_a_file_keeps_its_turn_while_the_server_is_away(started, server):
    spool, sender = started
    _log(spool, sender, [0])
    assert sender.flush(10.0)
    server.down = True
    before = server.attempts
    _files(spool, sender, "a.png")
    _log(spool, sender, [1])
    _wait(lambda: server.attempts >= before + 3)
    assert sender.backlog()[:2] == (1, 1)
    assert not load_sent(spool.path.parent, URI).aside
    server.down = False
    _wait(lambda: sender.flush(5.0))
    assert (server.files, server.steps) == (["a.png"], [0, 1])


def test_what_waits_aside_is_known_to_the_next_process(tmp_path, server):
    server.refused = {"a.png"}
    for steps in (range(3), range(3, 6)):
        spool = Spool(tmp_path)
        sender = Sender(spool, load_sent(tmp_path, "http://a"), server.connect, "http://a")
        sender.start()
        if not server.steps:
            _files(spool, sender, "a.png")
        _log(spool, sender, steps)
        assert sender.close(10.0) == (not server.refused)
        spool.close()
        server.refused = set()
    assert (server.files, server.steps) == (["a.png"], list(range(6)))


def test_a_night_without_the_server_ends_no_thread():
    assert sender_module._pause_s(1) == sender_module.RETRY_FIRST_S
    assert sender_module._pause_s(5000) == sender_module.RETRY_LAST_S
