"""The resident trainer: one process for the life of a `flower-client`, with torch, the data and the model in memory.

    flower-client --starts--> clients/flower/supernode.py: Flower's SuperNode and our executor
                  --starts--> this process  <--- local socket ---'

It answers one message at a time, ends with its flower-client, and ends itself when the executor that waits for an
answer goes (the server went): what it was computing is then of no use, and the next run finds a fresh one.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path

from flwr.app import RecordDict

from clients.egress import LEDGER, refusal
from clients.flower.handover import KEY, SITE, SOCKET, receive_content, send_content
from clients.site import SiteSettings
from common.events import SHOWN
from common.runtime import go_silent

LOOK_EVERY_S = 0.5
LEFT_ALONE = 3  # exit code: nobody waits for the answer any more

log = logging.getLogger("facefed.client")

Answer = Callable[[SiteSettings, RecordDict], RecordDict | str]


def site_to_json(site: SiteSettings) -> str:
    """A site's settings as the text that the trainer reads."""
    return json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in vars(site).items()})


def site_from_json(text: str) -> SiteSettings:
    """The inverse of `site_to_json`."""
    values = json.loads(text)
    return SiteSettings(**values | {name: Path(values[name]) for name in ("data_dir", "state_dir", "cache_dir")})


def end_with_parent(parent: int) -> None:
    """End this process as soon as it has another parent; the kernel's own signal exists on Linux only."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY_S)
        os._exit(LEFT_ALONE)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _end_when_left(connection: Connection, done: threading.Event) -> None:
    """Until `done`: the other side says nothing more, so what can be read is its end."""
    with contextlib.suppress(OSError):  # closed by us meanwhile
        while not done.is_set():
            if connection.poll(LOOK_EVERY_S) and not done.is_set():
                log.warning("the run was stopped in the middle of a task")
                os._exit(LEFT_ALONE)


def _answered(site: SiteSettings, content: RecordDict, answer: Answer) -> RecordDict | str:
    """The answer; whatever else goes wrong costs this reply only."""
    try:
        return answer(site, content)
    except Exception as error:
        log.exception("%s%s: the trainer failed, see trainer.log", SHOWN, site.name)
        reason = f"{site.name}: its trainer failed ({type(error).__name__}); the client's own output says why."
        return refusal(site.state_dir / LEDGER, site.name, content, reason)


def serve_one(connection: Connection, site: SiteSettings, answer: Answer) -> None:
    """Answer the one message of a connection.  Raises OSError, EOFError or ValueError when it breaks."""
    content = receive_content(connection)
    if isinstance(content, str):
        return  # a refusal is no message
    done = threading.Event()
    threading.Thread(target=_end_when_left, args=(connection, done), daemon=True).start()
    reply = _answered(site, content, answer)
    done.set()
    send_content(connection, reply)


def serve(folder: Path, site: SiteSettings, answer: Answer) -> None:
    """Answer what comes through the folder's socket, one connection after the other, for ever."""
    address = folder / SOCKET
    address.unlink(missing_ok=True)  # a trainer before this one left it
    before = os.umask(0o177)
    try:
        listener = Listener(str(address), family="AF_UNIX", backlog=16, authkey=(folder / KEY).read_bytes())
    finally:
        os.umask(before)
    with listener:
        while True:
            try:
                with listener.accept() as connection:
                    serve_one(connection, site, answer)
            except Exception as error:  # whatever one connection says, the next is served
                log.warning("a connection to the trainer broke (%s)", repr(error))


def main(folder: Path, parent: int) -> None:
    """Serve from `folder` until the process `parent`, a flower-client, ends."""
    end_with_parent(parent)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.INFO)
    go_silent()
    site = site_from_json((folder / SITE).read_text(encoding="utf-8"))
    from clients.answer import answer  # torch and all: seconds, while nobody waits yet

    serve(folder, site, answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
