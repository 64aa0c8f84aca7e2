"""The resident trainer: one process for the life of a `flower-client`, with torch, the data and the model in memory.

    flower-client --starts--> clients/flower/supernode.py: Flower's SuperNode and our executor
                  --starts--> this process  <--- local socket ---'

It answers one message at a time, ends with its flower-client, and ends itself when the executor that waits for an
answer goes (the server went): what it was computing is then of no use, and the next run finds a fresh one.  But whoever
packs to join goes on until somebody else wants the trainer: the next server asks for the same pictures.

Here are the way to it, the process, and, last, `Trainer`, which is the process as its flower-client sees it.  The
folder that all know is the user's own (0700) and holds the socket (0600) and a key, with which either side proves
itself (HMAC, `multiprocessing.connection`).  Nothing is pickled: a content travels as one JSON header, and then the
bytes of each array, in pieces, so that neither side holds them twice.  Only the process itself imports torch and what
reads data.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Self

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from clients import policy
from clients.egress import LEDGER, asked_by, refusal
from clients.flower.own_lines import ShownLines, follow, mark_of
from clients.site import SiteSettings
from common.errors import FaceFedError
from common.system.events import SHOWN
from common.system.files import short_private_folder, write_new
from common.system.processes import child_environment, start, stop
from common.system.progress import FILE as PROGRESS
from common.system.progress import tell_into
from common.system.runtime import go_silent

CLIENT_FAILED = 500  # as in common.protocol.wire, which would bring torch along
WAITS = "waits-"  # how the file of one is called, in the same folder, who waits for the trainer
JOIN = "join"  # the kind of a task, as in common.protocol.wire
SOCKET, KEY, SITE = "socket", "key", "site.json"
API = "supernode"  # the socket of the SuperNode's own API, in the same folder
THERE_WITHIN_S = 120.0  # a trainer that was started again imports torch first
KNOCK_EVERY_S = 0.05
LOOK_EVERY_S = 0.5
LEFT_ALONE = 3  # exit code: nobody waits for the answer any more, or it took longer than the site's policy allows
LOG = "trainer.log"  # in the state folder
STARTS_IN_VAIN = 3  # one that ends so often before it serves would end each time
LAST_BYTES = 2000
END_GRACE_S = 2.0  # it holds nothing that a later one would miss
_KINDS: Mapping[str, type[ConfigRecord] | type[MetricRecord]] = {"config": ConfigRecord, "metrics": MetricRecord}

log = logging.getLogger("facefed.client")

PIECE_BYTES = 5 * 2**20  # of an array at a time; Flower cuts it alike
Reader = Callable[[Connection, Array, int], None]
Answer = Callable[[SiteSettings, RecordDict], RecordDict | str]


class TrainerGone(Exception):
    """The trainer is not there, or went in the middle of its work."""


def send_content(connection: Connection, content: RecordDict | str) -> None:
    """Send a content, or a refusal's one line.  Raises OSError when the other side is gone.

    An array whose data is a deque of pieces gives each away when it is sent, so that nobody holds it any more.
    """
    if isinstance(content, str):
        connection.send_bytes(json.dumps({"refusal": content}).encode())
        return
    header: list[dict[str, Any]] = []
    arrays: list[Array] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays += record.values()
            layout = {key: [one.dtype, list(one.shape), one.stype, _size(one)] for key, one in record.items()}
            header.append({"name": name, "kind": "arrays", "arrays": layout})
        else:
            kind = "config" if isinstance(record, ConfigRecord) else "metrics"
            header.append({"name": name, "kind": kind, "values": dict(record)})
    connection.send_bytes(json.dumps({"records": header}).encode())
    for array in arrays:
        for piece in _pieces(array):
            connection.send_bytes(piece)


def _size(array: Array) -> int:
    data: Any = array.data
    return sum(map(len, data)) if isinstance(data, deque) else len(data)


def _pieces(array: Array) -> Iterator[memoryview]:
    data: Any = array.data
    while isinstance(data, deque) and data:
        yield data.popleft()
    if not isinstance(data, deque):
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), PIECE_BYTES):
            yield whole[start : start + PIECE_BYTES]


def read_whole(connection: Connection, array: Array, num_bytes: int) -> None:
    """Let the array have the next `num_bytes` that come, in one piece of memory that may be written to."""
    whole, taken = np.empty(num_bytes, dtype=np.uint8).data, 0
    while taken < num_bytes:
        taken += connection.recv_bytes_into(whole, taken)
    array.data = whole  # type: ignore[assignment]  # which the constructor refuses


def receive_content(connection: Connection, read: Reader = read_whole) -> RecordDict | str:
    """The inverse of `send_content`.  Raises EOFError when the other side is gone.

    read: takes an array's bytes, which come in pieces of at most PIECE_BYTES.
    """
    header = json.loads(connection.recv_bytes())
    if "refusal" in header:
        return str(header["refusal"])
    content = RecordDict()
    for record in header["records"]:
        if record["kind"] == "arrays":
            content[record["name"]] = received = ArrayRecord()
            for key, (dtype, shape, stype, num_bytes) in record["arrays"].items():
                received[key] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=b"")
                read(connection, received[key], num_bytes)
        else:
            content[record["name"]] = _KINDS[record["kind"]](record["values"])
    return content


def hand_over(
    folder: Path,
    content: RecordDict,
    read: Reader = read_whole,
    *,
    there_within_s: float = THERE_WITHIN_S,
    connected: Callable[[Connection], object] = bool,
) -> RecordDict | str:
    """Have the trainer of `folder` answer a message's content; returns the reply's content or the line of a refusal.

    content, read: as in `send_content` and `receive_content`.  connected: is told the connection, whose end has the
    trainer end its work.  Raises TrainerGone.
    """
    with _met(folder, there_within_s) as connection:
        connected(connection)
        try:
            send_content(connection, content)
            return receive_content(connection, read)
        except (OSError, EOFError):
            raise TrainerGone("the trainer went in the middle of its work; it is started again.") from None


def _met(folder: Path, there_within_s: float) -> Connection:
    """A connection that the trainer of `folder` has accepted.  Raises TrainerGone."""
    deadline, mark = time.monotonic() + there_within_s, folder / f"{WAITS}{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        mark.touch()
    try:
        while True:
            try:
                return Client(str(folder / SOCKET), family="AF_UNIX", authkey=(folder / KEY).read_bytes())
            except AuthenticationError:
                raise TrainerGone("the trainer does not know this client's key; restart flower-client.") from None
            except (OSError, EOFError):  # it is starting, or has just gone
                if time.monotonic() > deadline or not folder.is_dir():
                    raise TrainerGone("the trainer is not there; its flower-client's output says why.") from None
                time.sleep(KNOCK_EVERY_S)
    finally:
        mark.unlink(missing_ok=True)


def site_to_json(site: SiteSettings) -> str:
    """A site's settings as the text that the trainer reads."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(site).items()}
    return json.dumps(values | {"policy": policy.to_json(site.policy)})


def site_from_json(text: str) -> SiteSettings:
    """The inverse of `site_to_json`."""
    values = json.loads(text)
    values |= {name: Path(values[name]) for name in ("data_dir", "state_dir", "cache_dir", "keys") if values[name]}
    return SiteSettings(**values | {"policy": policy.from_json(values["policy"])})


def end_with_parent(parent: int) -> None:
    """End this process as soon as it has another parent; the kernel's own signal exists on Linux only."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY_S)
        os._exit(LEFT_ALONE)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _end_when_left(
    connection: Connection, done: threading.Event, most_s: float, stays: Callable[[], bool] = lambda: False
) -> None:
    """Until `done`: the other side says nothing more, so what can be read is its end.  It ends after `most_s` too.

    stays: whether the work goes on all the same.
    """
    end = time.monotonic() + most_s
    with contextlib.suppress(OSError):  # closed by us meanwhile
        while not done.is_set():
            if time.monotonic() > end:
                log.warning("%sa task took longer than %g s (max_task_seconds) and is ended", SHOWN, most_s)
                os._exit(LEFT_ALONE)
            if connection.poll(LOOK_EVERY_S) and not done.is_set():
                if stays():
                    done.wait(LOOK_EVERY_S)
                    continue
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


def serve_one(
    connection: Connection, site: SiteSettings, answer: Answer, is_wanted: Callable[[], bool] = lambda: True
) -> None:
    """Answer the one message of a connection.  Raises OSError, EOFError or ValueError when it breaks.

    is_wanted: whether somebody else waits for an answer; until then a site goes on packing to join.
    """
    content = receive_content(connection)
    if isinstance(content, str):
        return  # a refusal is no message
    done, joins = threading.Event(), asked_by(content).kind == JOIN
    watched = (connection, done, site.policy.max_task_seconds, lambda: joins and not is_wanted())
    threading.Thread(target=_end_when_left, args=watched, daemon=True).start()
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
        for mark in folder.glob(f"{WAITS}*"):  # of who was killed while it waited
            mark.unlink(missing_ok=True)

        def is_wanted() -> bool:
            return any(folder.glob(f"{WAITS}*"))

        while True:
            try:
                with listener.accept() as connection:
                    serve_one(connection, site, answer, is_wanted)
            except Exception as error:  # whatever one connection says, the next is served
                log.warning("a connection to the trainer broke (%s)", repr(error))


def main(folder: Path, parent: int) -> None:
    """Serve from `folder` until the process `parent`, a flower-client, ends."""
    end_with_parent(parent)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ShownLines(mark_of((folder / KEY).read_bytes())))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    go_silent()
    site = site_from_json((folder / SITE).read_text(encoding="utf-8"))
    tell_into(site.state_dir / PROGRESS)
    from clients.message_handler import answer  # torch and all: seconds, while nobody waits yet

    serve(folder, site, answer)


class Trainer:
    """One trainer process after the other, while the block lasts."""

    def __init__(self, site: SiteSettings, notice: Callable[[str], object]) -> None:
        """notice: gets each line that the trainer has for the user."""
        self._site, self._notice = site, notice

    def __enter__(self) -> Self:
        """Make the folder and start the first."""
        # Not in the state folder, whose path may be too long for a socket's.
        self.folder = short_private_folder("facefed-", max(SOCKET, API, key=len))
        self._in_vain = 0  # starts in a row of which none came as far as to serve
        try:
            write_new(self.folder / KEY, secrets.token_bytes(32))
            write_new(self.folder / SITE, site_to_json(self._site).encode())
            self._start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        stop(self._process, END_GRACE_S)
        self._reader.join(timeout=5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        (self.folder / SOCKET).unlink(missing_ok=True)  # of the one before: where there is one, this one serves
        self._process = start(
            [sys.executable, "-P", "-m", "clients.flower.trainer", str(self.folder), str(os.getpid())],
            environment=child_environment(self._site.state_dir / "flwr"),
            output=subprocess.PIPE,
        )
        mark = mark_of((self.folder / KEY).read_bytes())
        self._reader = follow(self._process, self._site.state_dir / LOG, mark, self._notice)

    def keep_alive(self) -> None:
        """Start another where the last one has ended.  Raises FaceFedError where none can start here."""
        code = self._process.poll()
        if code is None:
            return
        served = code == LEFT_ALONE or (self.folder / SOCKET).exists()
        self._in_vain = 0 if served else self._in_vain + 1
        if self._in_vain >= STARTS_IN_VAIN:
            self._reader.join(timeout=5)
            file = self._site.state_dir / LOG
            why = f"killed by signal {-code}, perhaps for want of memory" if code < 0 else f"exit code {code}"
            raise FaceFedError(f"the trainer cannot start ({why}); the last that {file} has of it: {_last_line(file)}")
        if code != LEFT_ALONE:
            log.warning("the trainer ended (exit code %d, see %s); another is started", code, self._site.state_dir)
        self._start()


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LAST_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
