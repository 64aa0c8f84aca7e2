"""What a person sees: plain lines in a pipe, a bar on a terminal, one line for an error, and the exit codes."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import ConfigError, DataError, FaceFedError, InterruptedRun, TrainingFailed
from common.system import console
from common.system.console import Follower, PackProgress, RunView, event_line, run_program, summary_lines, table
from common.system.events import EventLog, EventReader

ROOT = Path(__file__).resolve().parents[2]
JOINED = {
    "kind": "joined",
    "client": "celeba",
    "people": 1200,
    "pictures": 34567,
    "device": "cpu",
    "here": ["celeba"],
    "wanted": 2,
}
ROUND = {"kind": "round", "round": 1, "rounds": 3, "clients": 2, "train_loss": 4.5678, "seconds": 1.25}
MEMBERS = {"kind": "members", "clients": 2, "rounds": 3}
EVENTS = [
    (JOINED, "joined: celeba (1,200 people, 34,567 training pictures, cpu); 1 of 2 clients are here"),
    (
        {"kind": "waiting", "here": [], "wanted": 2, "seconds": 10},
        "waiting for clients: nobody yet here, 2 more needed (10 s)",
    ),
    (
        {"kind": "waiting", "here": ["a"], "wanted": 2, "seconds": 20},
        "waiting for clients: a here, 1 more needed (20 s)",
    ),
    ({"kind": "refused", "client": "a", "round": 2, "reason": "it is late"}, "left out in round 2: a: it is late"),
    ({"kind": "refused", "client": "", "reason": "a: no pictures"}, "left out: a: no pictures"),
    (ROUND, "round 1 of 3: 2 clients, train loss 4.568, 1.2 s"),
    (
        {
            "kind": "scored",
            "round": 0,
            "split": "val",
            "val_roc_auc": 0.5,
            "val_eer": 0.25,
            "val_accuracy": 0.1,
        },
        "untrained model: val: AUC 0.500, EER 0.250, accuracy 0.100",
    ),
    ({"kind": "scored", "round": 2, "split": "test", "round_test_roc_auc": 0.75}, "model of round 2: test: AUC 0.750"),
    ({"kind": "scored", "round": 2, "split": "test"}, ""),
    ({"kind": "saving"}, "registering the model"),
    ({"kind": "resumed", "round": 3}, "going on after round 3"),
    ({"kind": "gathered", "clients": 1000, "wanted": 50}, "joined: 1,000 clients are here (50 needed)"),
    ({"kind": "warning", "line": "a word"}, "a word"),
    ({"kind": "stopped_early", "round": 3, "line": "stopped early after round 3"}, "stopped early after round 3"),
    (MEMBERS, ""),
    ({"kind": "finished"}, ""),
    ({"kind": "failed", "line": "x", "exit_code": 1}, ""),
]


@pytest.mark.parametrize(
    ("event", "line"), EVENTS, ids=lambda value: value if isinstance(value, str) else value["kind"]
)
def test_each_event_is_a_plain_line(event, line):
    assert event_line(event) == line
    out = io.StringIO()
    with RunView(out) as view:
        view.show(event)
    assert out.getvalue() == (line + "\n" if line else "")


def test_every_kind_that_is_emitted_is_known_here():
    """A new event needs a decision whether a person reads it."""
    emitted = set()
    for package in ("common", "server", "clients", "simulation"):
        for file in (ROOT / package).rglob("*.py"):
            emitted |= set(re.findall(r"""\.emit\(\s*"(\w+)\"""", file.read_text("utf-8")))
    assert emitted
    assert emitted <= {event["kind"] for event, _ in EVENTS}


class Terminal:
    """A pseudo-terminal of 100 columns, read when it is closed."""

    def __enter__(self):
        import fcntl
        import struct
        import termios

        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.stream = os.fdopen(slave, "w")
        return self

    def __exit__(self, *_):
        self.stream.close()
        os.close(self._master)

    def text(self) -> str:
        """What was written so far, without the codes that move the cursor and colour."""
        self.stream.flush()
        os.set_blocking(self._master, False)
        parts = []
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            try:
                parts.append(os.read(self._master, 65536))
            except BlockingIOError:
                time.sleep(0.02)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(parts).decode())


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    with Terminal() as opened:
        yield opened


def test_a_terminal_gets_a_bar_with_round_clients_and_time(terminal):
    with RunView(terminal.stream) as view:
        for event in (JOINED, MEMBERS, ROUND, ROUND | {"round": 2, "clients": 1}):
            view.show(event)
        view.show({"kind": "warning", "line": "[bold]as it is[/bold]"})
    text = terminal.text()
    assert "joined: celeba (1,200 people" in text
    assert "[bold]as it is[/bold]" in text
    last = re.findall(r"federating[^\n]*", text)[-1]
    assert "round 2/3" in last
    assert "1 clients" in last
    assert re.search(r"\d:\d\d:\d\d left (-|\d)", last)
    assert "━" in last


def test_a_client_that_joins_late_brings_no_second_bar(terminal):
    with RunView(terminal.stream) as view:
        for event in (MEMBERS, ROUND, MEMBERS | {"clients": 3}, ROUND | {"round": 2, "clients": 3}):
            view.show(event)
    assert len(view._progress.tasks) == 1
    assert view._progress.tasks[0].completed == 2


def test_packing_has_a_bar_on_a_terminal_and_a_line_elsewhere(terminal):
    progress = PackProgress("packing celeba", terminal.stream)
    for done in (0, 500, 1000):
        progress(done, 1000)
    progress.close()
    assert "packing celeba" in terminal.text()

    out = io.StringIO()
    progress = PackProgress("packing celeba", out)
    for done in (0, 500, 1000):
        progress(done, 1000)
    assert out.getvalue() == ""
    progress.close()
    assert out.getvalue() == "packing celeba: 1,000 pictures\n"


def test_packing_that_broke_off_tells_how_far_it_came_and_none_tells_nothing():
    out = io.StringIO()
    progress = PackProgress("packing celeba", out)
    progress(500, 1000)
    progress.close()
    assert out.getvalue() == "packing celeba: 500 pictures\n"
    out = io.StringIO()
    PackProgress("packing celeba", out).close()
    assert out.getvalue() == ""


# --------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (DataError("data/x: no such folder."), 2, ["prog: data/x: no such folder."]),
        (ConfigError(["a = 1 is bad", "b = 2 is bad"]), 2, ["prog: a = 1 is bad", "prog: b = 2 is bad"]),
        (TrainingFailed("the loss is nan"), 1, ["prog: the loss is nan"]),
        (FaceFedError("it failed"), 1, ["prog: it failed"]),
        (InterruptedRun("stopped by the user"), 130, ["prog: stopped by the user"]),
        (KeyboardInterrupt(), 130, ["prog: stopped."]),
        (OSError(28, "No space left on device"), 1, ["prog: [Errno 28] No space left on device"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_its_lines_and_its_exit_code(error, code, lines):
    def work() -> int:
        raise error

    err = io.StringIO()
    assert run_program("prog", work, err) == code
    assert err.getvalue().splitlines() == lines


def test_done_is_what_the_work_says():
    err = io.StringIO()
    assert [run_program("prog", lambda code=code: code, err) for code in (0, 1)] == [0, 1]
    assert err.getvalue() == ""


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_program("prog", lambda: 1 // 0, io.StringIO())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_any_program_with_130_and_its_doors_closed(number):
    code = (
        "import sys, time\nfrom common.system.console import run_program\n"
        "def work():\n"
        "    try:\n        print('at work', flush=True)\n        time.sleep(60)\n"
        "    finally:\n        print('closed', flush=True)\n"
        "sys.exit(run_program('prog', work, sys.stderr))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "at work\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "closed\n", "prog: stopped.\n")


def test_signals_can_ask_instead_and_come_back_afterwards():
    asked = []
    before = signal.getsignal(signal.SIGTERM)
    with console.stopping_on_signals(lambda: asked.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert asked == [1, 1]
    assert signal.getsignal(signal.SIGTERM) is before
    run_program("prog", lambda: 0, io.StringIO())
    assert signal.getsignal(signal.SIGTERM) is before


# -------------------------------------------------------------------------------------------------------- the summary

SUMMARY = {
    "rounds": 3,
    "best_round": 2,
    "model_sha256": "ab" * 32,
    "untrained": {"roc_auc": 0.6, "eer": 0.4},
    "best": {"roc_auc": 0.95, "eer": 0.1},
    "clients": {
        "celeba": {"test_accuracy": 0.5, "test_roc_auc": 0.9, "test_eer": 0.2, "test_tar_at_far_1e-2": 0.3},
        "vggface2": {"test_roc_auc": 0.8},
    },
    "registered": ["models:/cnn_federated_fedavg/1 (best, round 2)"],
    "refused_replies": 1,
}


def test_the_summary_says_what_was_learned_and_where_to_look():
    text = "\n".join(summary_lines(SUMMARY, folder="runs/x", tracking="off"))
    assert "test AUC on people never seen: untrained 0.600 -> federated 0.950 (EER 0.400 -> 0.100)" in text
    assert "best round 2 of 3" in text
    assert re.search(r"^celeba +0\.500 +0\.900 +0\.200 +0\.300$", text, re.MULTILINE)
    assert re.search(r"^vggface2 +- +0\.800 +- +-$", text, re.MULTILINE)
    for line in (
        f"model SHA-256 {'ab' * 32}",
        "registered: models:/cnn_federated_fedavg/1 (best, round 2)",
        "replies left out: 1 (see runs/x/metrics.json)",
        "tracking: off",
    ):
        assert line in text.splitlines()


def test_a_summary_without_scores_is_shorter():
    lines = summary_lines({"model_sha256": "ab", "rounds": 1, "best_round": 0}, folder="f", tracking="t")
    assert "model SHA-256 ab" in lines
    assert not any("AUC" in line or "left out" in line for line in lines)


def test_tables_are_aligned():
    assert table([["a", "bbb"], ["cccc", "d"]]).splitlines() == ["a     bbb", "----  ---", "cccc  d"]
    assert console.counts({"people": 1234, "pictures": 5}) == "1,234 people, 5 pictures"


def test_a_follower_shows_everything_up_to_the_end(tmp_path):
    out = io.StringIO()
    log = EventLog(tmp_path)
    with RunView(out) as view, Follower(EventReader(tmp_path), view) as follower:
        log.emit(**JOINED)
        log.emit("finished", model_sha256="ab", rounds=3)
    assert out.getvalue().startswith("joined: celeba")
    assert (follower.summary["model_sha256"], follower.summary["rounds"]) == ("ab", 3)


def test_logging_is_plain_and_ours_only(capsys):
    import logging

    logger = logging.getLogger("facefed")
    before = (logger.level, list(logger.handlers), logger.propagate)
    try:
        console.set_up_logging("warning")
        console.set_up_logging("warning")  # twice: still one line for each word
        logging.getLogger("facefed.x").warning("a word")
        logging.getLogger("facefed.x").info("too much")
        assert capsys.readouterr().err == "WARNING facefed.x: a word\n"
    finally:
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1], before[2]
