"""The front door as a container of its own: FaceFed's nginx, open while the SuperLink behind it is there.

python run_proxy.py LISTEN_PORT SUPERLINK_HOST SUPERLINK_PORT TLS_DIR

A site tells by a shut port that its server has gone, and starts afresh with the next one, which does not know its node.
So the door is shut where nothing is behind it, and for long enough that a site sees it.
"""

import logging
import sys
import tempfile
import threading
from pathlib import Path

from common.errors import EXIT_INTERRUPTED, FaceFedError
from common.system.certs import ServerFiles, read_server_folder
from common.system.console import run_program, set_up_logging, stopping_on_signals
from common.system.processes import can_connect, is_healthy
from server.flower.front_door import Door, FrontDoor

LOOK_EVERY_S = 0.5
MISSES = 2  # that shut the door; only a SuperLink that has ended refuses connections
SHUT_AT_LEAST_S = 5.0  # a site looks each half second, and believes what it saw three times
ANSWER_WITHIN_S = 5.0

log = logging.getLogger("facefed.proxy")


def keep_door(door: Door, tls: ServerFiles, stop: threading.Event) -> None:
    """Open and shut it until `stop` is set.  Raises FaceFedError when nginx ends by itself."""
    host, port = door.superlink_host, door.superlink_port
    while not stop.is_set():
        if not is_healthy(host, port, ca=tls.ca, timeout_s=ANSWER_WITHIN_S):
            stop.wait(LOOK_EVERY_S)
            continue
        with tempfile.TemporaryDirectory(prefix="door-") as folder, FrontDoor(door, Path(folder)) as opened:
            log.info("open at port %d, before %s:%d", door.port, host, port)
            misses = 0
            while misses < MISSES and not stop.wait(LOOK_EVERY_S):
                misses = 0 if can_connect(host, port, ANSWER_WITHIN_S) else misses + 1
                if opened.process.poll() is not None:
                    said = (Path(folder) / "error.log").read_text(encoding="utf-8", errors="replace")
                    raise FaceFedError(f"nginx ended with exit code {opened.process.returncode}: {said.strip()[-400:]}")
        log.info("shut; the SuperLink is gone")
        stop.wait(SHUT_AT_LEAST_S)


def main(port: int, superlink_host: str, superlink_port: int, folder: Path) -> int:
    """Returns the exit code, that of a program which was told to stop."""
    set_up_logging("info")
    tls = read_server_folder(folder, superlink_host)
    everywhere = "0.0.0.0"  # noqa: S104 - the container's own addresses
    door = Door(host=everywhere, port=port, superlink_host=superlink_host, superlink_port=superlink_port, tls=tls)
    stop = threading.Event()
    with stopping_on_signals(stop.set):
        keep_door(door, tls, stop)
    return EXIT_INTERRUPTED


if __name__ == "__main__":
    listen, host, behind, certificates = sys.argv[1:]
    sys.exit(run_program("proxy", lambda: main(int(listen), host, int(behind), Path(certificates)), sys.stderr))
