"""The status page: what a run's events come to, what it says as HTML and JSON, and that it can only be read."""

import contextlib
import http.client
import json
import socket
import struct
import threading
import time
import urllib.request

import pytest

from common.errors import UserError
from common.metrics.names import BYTES_DOWN, BYTES_UP
from common.system.events import EventLog
from server import status
from server.cli import parser
from server.status import MOST_AT_ONCE, MOST_SHOWN, MOST_WAITING, FederationStatus, StatusServer, page, status_address

NOW = 1000.0
JOINED = {"people": 6, "pictures": 24, "device": "cpu", "wanted": 2}


def status_of(*events):
    """The status after these events, each (time, kind, values)."""
    status = FederationStatus("run-1")
    for when, kind, values in events:
        status.take({"kind": kind, "time": when, **values})
    return status


TWO_HERE = (
    (1.0, "begun", {"model": "resnet18, 11.2 M"}),
    (2.0, "joined", {"client": "alpha", "here": ["alpha"], **JOINED}),
    (3.0, "joined", {"client": "beta", "here": ["alpha", "beta"], **JOINED}),
    (4.0, "members", {"clients": 2, "rounds": 10, "compute": ""}),
)


def test_who_is_missing_is_told_with_since_when_and_no_longer_when_they_came():
    waiting = (5.0, "waiting", {"here": ["alpha"], "wanted": 2, "seconds": 3})
    later = (9.0, "waiting", {"here": ["alpha"], "wanted": 2, "seconds": 7, "at_work": {"beta": "packing 31 %"}})

    shown = status_of(waiting, later).as_json(NOW)
    assert shown["clients"] == {"here": 1, "wanted": 2, "missing_since": "1970-01-01T00:00:05+00:00"}
    assert (shown["state"], shown["sites"]["beta"]["words"]) == ("waiting", "packing 31 %")
    assert "1 more clients are needed, since 1970-01-01 00:00:05" in page(shown)

    assert status_of(waiting, *TWO_HERE).as_json(NOW)["clients"]["missing_since"] is None


def test_a_site_goes_from_joined_to_working_to_answered_or_left_out_with_its_last_sign():
    asked = (10.0, "asked", {"round": 1, "task": "train", "clients": 2, "pictures": 48, "names": ["alpha", "beta"]})
    heard = (12.0, "progress", {"client": "beta", "work": "training", "words": "training 40 %", "pictures": 9})
    answered = (15.0, "answered", {"answered": 1, "pictures": 24, "client": "alpha"})
    refused = (60.0, "refused", {"client": "beta", "round": 1, "reason": "no answer within 40 s"})

    at_work = status_of(*TWO_HERE, asked, heard).as_json(NOW)
    assert (at_work["state"], at_work["round"], at_work["rounds"]) == ("training", 1, 10)
    assert {name: site["state"] for name, site in at_work["sites"].items()} == {"alpha": "working", "beta": "working"}
    assert at_work["sites"]["beta"]["words"] == "training 40 %"

    sites = status_of(*TWO_HERE, asked, heard, answered, refused).as_json(NOW)["sites"]
    assert (sites["alpha"]["state"], sites["alpha"]["missing_since"]) == ("answered", None)
    assert (sites["beta"]["state"], sites["beta"]["missing_since"]) == ("left out", "1970-01-01T00:00:12+00:00")
    assert (sites["beta"]["since"], sites["beta"]["refusals"]) == ("1970-01-01T00:01:00+00:00", 1)


def test_rounds_have_scores_bytes_and_the_time_that_is_left():
    def whole(number, when):
        sizes = {BYTES_DOWN: 2e6, BYTES_UP: 1e6}
        return (when, "round", {"round": number, "clients": 2, "seconds": 10.0, "train_loss": 1.25, **sizes})

    scored = (31.0, "scored", {"round": 1, "split": "val", "best_round": 1, "val_roc_auc": 0.71})
    status = status_of(
        *TWO_HERE, (10.0, "asked", {"round": 1, "task": "train"}), whole(1, 20.0), whole(2, 30.0), scored
    )

    shown = status.as_json(34.0)

    assert shown["bytes"] == {BYTES_DOWN: 4e6, BYTES_UP: 2e6}
    assert shown["rounds_table"][0] | {"ended": 0} == {
        "round": 1, "clients": 2, "seconds": 10.0, "ended": 0, "train_loss": 1.25, BYTES_DOWN: 2e6, BYTES_UP: 1e6,
        "val_roc_auc": 0.71,
    }  # fmt: skip
    assert shown["seconds_left"] == 8 * 10.0 - 4.0
    assert shown["best_round"] == 1
    told = page(shown)
    assert "1 min 16 s" in told
    assert "4.0 MB, 2.0 MB" in told
    assert "<tr class='best'><td class='n'>1</td>" in told


def test_a_sites_own_score_is_shown_only_where_the_run_has_it():
    scored = (31.0, "scored", {"round": 1, "split": "val", "best_round": 1, "sites": {"alpha": 0.625}})
    without = status_of(*TWO_HERE).as_json(NOW)
    assert {site["val_auc"] for site in without["sites"].values()} == {None}
    assert "own val AUC" not in page(without)
    with_it = status_of(*TWO_HERE, scored).as_json(NOW)
    assert with_it["sites"]["alpha"]["val_auc"] == 0.625
    assert "own val AUC" in page(with_it)


def test_what_a_site_says_is_no_markup():
    refused = (9.0, "refused", {"client": "<b>x", "reason": "<script>alert(1)</script>"})
    told = page(status_of(*TWO_HERE, refused).as_json(NOW))
    assert "<script" not in told
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in told
    assert "&lt;b&gt;x" in told


def test_of_very_many_refusals_the_last_are_kept_and_all_are_counted():
    refusals = [(float(n), "refused", {"client": "alpha", "reason": f"reason {n}"}) for n in range(MOST_SHOWN + 20)]
    shown = status_of(*TWO_HERE, *refusals).as_json(NOW)
    assert (shown["num_refusals"], len(shown["refusals"])) == (MOST_SHOWN + 20, MOST_SHOWN)
    assert shown["refusals"][-1]["reason"] == f"reason {MOST_SHOWN + 19}"
    assert f"the last {MOST_SHOWN} of {MOST_SHOWN + 20}" in page(shown)


def test_of_very_many_warnings_too():
    shown = status_of(*TWO_HERE, *[(float(n), "warning", {"line": f"line {n}"}) for n in range(MOST_SHOWN + 7)])
    told = shown.as_json(NOW)
    assert (told["num_warnings"], len(told["warnings"])) == (MOST_SHOWN + 7, MOST_SHOWN)
    assert f"the last {MOST_SHOWN} of {MOST_SHOWN + 7}" in page(told)


def test_an_end_is_told_with_its_line_and_an_unknown_event_changes_nothing():
    shown = status_of(*TWO_HERE, (9.0, "failed", {"line": "too few", "exit_code": 1}), (10.0, "new kind", {})).as_json(
        NOW
    )
    assert (shown["state"], shown["line"]) == ("failed", "too few")
    assert "too few" in page(shown)


@pytest.fixture
def server(tmp_path):
    log = EventLog(tmp_path / "run-1")
    log.emit("begun", model="resnet18")
    with StatusServer(tmp_path / "run-1", "127.0.0.1", 0) as one:
        yield one, log


def ask(server, method, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_it_answers_with_what_was_told_until_then_and_nothing_can_be_sent(server):
    one, log = server
    code, headers, text = ask(one, "GET", "/")
    assert (code, "resnet18" in text) == (200, True)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert headers["Server"] == "facefed"
    log.emit("joined", client="gamma", here=["gamma"], **JOINED)
    with urllib.request.urlopen(f"http://127.0.0.1:{one.port}/status.json", timeout=10) as answer:
        assert list(json.load(answer)["sites"]) == ["gamma"]
    assert ask(one, "GET", "/../config.toml")[0] == 404
    assert ask(one, "POST", "/")[0] == 501
    assert ask(one, "HEAD", "/")[2] == ""


def test_a_name_that_was_led_here_is_refused(server):
    one, _ = server
    assert ask(one, "GET", "/status.json", Host="attacker.example:80")[0] == 403
    assert ask(one, "GET", "/status.json", Host=f"localhost:{one.port}")[0] == 200


def test_whoever_goes_in_the_middle_leaves_no_traceback(server, capfd):
    one, _ = server
    for line in (b"", b"GET / HTTP/1.0\r\nHo"):  # as a scanner of ports does
        with socket.create_connection(("127.0.0.1", one.port), timeout=10) as rude:
            rude.sendall(line)
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no end
    assert ask(one, "GET", "/")[0] == 200
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def reading(connection):
    """All that comes until the other side ends it."""
    with connection:
        return b"".join(iter(lambda: connection.recv(4096), b""))


def test_a_fixed_number_is_answered_at_a_time_and_whoever_comes_beyond_is_told_so(server):
    one, _ = server

    def connect():
        connection = socket.create_connection(("127.0.0.1", one.port))
        connection.settimeout(60)
        return connection

    before = threading.active_count()
    silent = [connect() for _ in range(MOST_AT_ONCE)]
    deadline = time.monotonic() + 60
    while one._server._waiting.qsize() or threading.active_count() < before + MOST_AT_ONCE:  # a timer for each
        assert time.monotonic() < deadline
        time.sleep(0.01)
    waiting = [connect() for _ in range(MOST_WAITING)]
    beyond = connect()
    assert reading(beyond).startswith(b"HTTP/1.0 503 ")
    assert threading.active_count() == before + MOST_AT_ONCE

    for connection in waiting:
        connection.sendall(b"GET /status.json HTTP/1.0\r\nHost: localhost:1\r\n\r\n")
    for connection in silent:
        connection.close()
    assert {reading(connection)[:12] for connection in waiting} == {b"HTTP/1.0 200"}


def test_a_connection_that_says_a_little_for_ever_is_ended(server, monkeypatch, caplog):
    one, _ = server
    monkeypatch.setattr(status, "ANSWER_WITHIN_S", 0.3)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", one.port)) as slow, contextlib.suppress(ConnectionError):
        slow.settimeout(0.05)
        while True:
            slow.sendall(b"G")
            with contextlib.suppress(TimeoutError):
                if not slow.recv(1):
                    break
            assert time.monotonic() < began + 60
    assert "Traceback" not in caplog.text
    assert ask(one, "GET", "/")[0] == 200


def test_what_cannot_be_shown_is_a_line(server, capfd, caplog):
    one, log = server
    log.emit("round", round="none")
    with pytest.raises(http.client.HTTPException):
        ask(one, "GET", "/")
    assert "the status page could not answer: ValueError" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_the_port_is_of_this_machine_alone_unless_an_address_is_given():
    assert status_address("8081") == ("127.0.0.1", 8081)
    assert status_address("0.0.0.0:8081") == ("0.0.0.0", 8081)  # noqa: S104
    for wrong in ("0", "70000", "http", "", "8081x"):
        with pytest.raises(UserError, match=r"--status-port"):
            status_address(wrong)
    assert parser().parse_args(["--status-port", "8081"]).status_port == "8081"


def test_a_port_that_is_taken_is_the_users_mistake(server, tmp_path):
    one, _ = server
    with pytest.raises(UserError, match=r"--status-port"):
        StatusServer(tmp_path, "127.0.0.1", one.port)
