"""What a person sees of any program: a bar while pictures are packed, one line for an error, and the exit codes."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigError, DataError, FaceFedError, InterruptedRun, TrainingFailed
from common.system import console
from common.system.console import PackProgress, run_program, table

ROOT = Path(__file__).resolve().parents[2]


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


def test_packing_that_goes_on_tells_what_was_there():
    out = io.StringIO()
    for goes_on in (True, False):
        progress = PackProgress("packing celeba", out, goes_on=goes_on)
        progress(80, 96)
        progress(96, 96)
        progress.close()
    assert out.getvalue() == "packing celeba: 96 pictures, 80 of them were there already\npacking celeba: 96 pictures\n"


def test_packing_that_broke_off_tells_how_far_it_came_and_none_tells_nothing():
    out = io.StringIO()
    progress = PackProgress("packing celeba", out)
    progress(0, 1000)
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


def test_tables_are_aligned():
    assert table([["a", "bbb"], ["cccc", "d"]]).splitlines() == ["a     bbb", "----  ---", "cccc  d"]
    assert console.counts({"people": 1234, "pictures": 5}) == "1,234 people, 5 pictures"


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
