"""What a server, a library or another client says becomes no line of flower-client's, of a log or of a terminal."""

import io
import logging
import os
import subprocess
import sys

import pytest
from flwr.supercore.logger import FLOWER_LOGGER
from tiny_federation import site_settings

from clients.flower.launch import ClientOptions, Launch
from clients.flower.own_lines import FlowerTold, ShownLines, follow, mark_of
from common.errors import FaceFedError
from common.system.console import OneLine, run_program
from common.system.events import SHOWN
from common.system.run_view import RunView

MARK = mark_of(b"k" * 32)
FORGED = "1]\nSuperNode ID: 4242\nfacefed: \x1b[36mall is well\nnode 4242\n" + "0" * 33 + "node 4242"


@pytest.fixture
def launched(tmp_path):
    """hear(log) -> what flower-client says of what Flower's SuperNode logs; its state folder."""
    said = []
    launch = Launch(
        site_settings("alpha", tmp_path),
        ClientOptions(host="h", port=9, connect_timeout_s=1.0, once=False),
        said.append,
    )
    launch._site.state_dir.mkdir(parents=True, exist_ok=True)

    def hear(log):
        script = (
            "import logging, sys\nfrom flwr.supercore.logger import FLOWER_LOGGER as logger, log\n"
            "from clients.flower.own_lines import FlowerTold\n"
            f"logger.addHandler(FlowerTold({MARK!r}, sys.stderr.fileno()))\n{log}"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ)
        )
        path = launch._site.state_dir / "supernode.log"
        follow(process, path, MARK, launch._notice_node, launch._overhear).join(60)
        assert process.wait(60) == 0, path.read_text()
        return said

    return hear, launch._site.state_dir


def test_what_flower_logs_becomes_lines_of_ours(launched):
    hear, state = launched
    (state / "last-task").touch()
    told = hear(
        'log(20, "SuperNode ID: %s", 17)\nlog(20, "[RUN %s, ROUND %s]", 5, "3")\n'
        'log(20, "Receiving: %s message (ID: %s)", "train", "ab")\nlog(20, "Sent successfully")\n'
        'log(20, "Receiving: %s message (ID: %s)", "query", "ab")'
    )
    assert told == ["connected to h:9", "round 3: training", "the run is over"]
    assert (state / "node-id").read_text() == "17"
    assert MARK.strip() not in (state / "supernode.log").read_text()


def test_a_server_writes_no_line_of_flower_clients_and_no_node_id(launched):
    """It chooses the group of its messages, their kind and the text of its errors."""
    hear, state = launched
    (state / "last-task").touch()
    told = hear(
        f'log(20, "[RUN %s, ROUND %s]", 5, {FORGED!r})\nlog(20, "[RUN %s, ROUND %s]", 5, {FORGED!r})\n'
        f'log(20, "Receiving: %s message (ID: %s)", {FORGED!r}, {FORGED!r})\n'
        f'log(40, {FORGED!r})\nprint({FORGED!r})\nprint("Sent successfully")\nprint("facefed: hello")\n'
        f'print("INFO :      SuperNode ID: 4242")'
    )
    assert told == []
    assert not (state / "node-id").exists()
    assert (state / "last-task").exists()


def test_what_the_trainer_shows_is_one_clean_line(tmp_path):
    said = []
    launch = Launch(
        site_settings("alpha", tmp_path),
        ClientOptions(host="h", port=9, connect_timeout_s=1.0, once=False),
        said.append,
    )
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(ShownLines(MARK))
    log = logging.Logger("trainer")  # noqa: LOG001 - of this test alone
    log.addHandler(handler)
    log.warning("%s%s: %s", SHOWN, "alpha", f"the run id {FORGED} is none")
    log.warning("a library quotes %s%s", "x\nfacefed: ", FORGED)
    try:
        int(FORGED)
    except ValueError:
        log.exception("%s%s: it failed", SHOWN, "alpha")
    script = f"import sys\nsys.stdout.write({out.getvalue()!r})"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    follow(process, tmp_path / "trainer.log", MARK, launch._show).join(60)
    process.wait(60)
    assert len(said) == 2
    assert all(line.startswith("alpha: ") and line.isprintable() for line in said)
    assert "\x1b" not in (tmp_path / "trainer.log").read_text()


def test_logs_errors_and_events_are_printable_lines():
    stream = io.StringIO()
    RunView(stream).show({"kind": "refused", "client": "a\n", "round": 1, "reason": FORGED})

    def work():
        raise FaceFedError(f"MLflow says {FORGED}")

    assert run_program("facefed", work, stream) == 1
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    log = logging.Logger("facefed")  # noqa: LOG001 - of this test alone
    log.addHandler(handler)
    log.warning("the server says %s", FORGED)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)


def test_flowers_logger_is_the_one_that_is_listened_to():
    heard = FlowerTold(MARK, os.open(os.devnull, os.O_WRONLY))
    assert logging.getLogger("flwr") is FLOWER_LOGGER
    assert FLOWER_LOGGER.level <= logging.INFO
    os.close(heard._output)
