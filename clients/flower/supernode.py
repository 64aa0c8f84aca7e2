"""A site's connection to the federation: Flower's SuperNode and, beside it in one process, our executor.

    flower-client --starts--> this process --hands each message over--> the resident trainer (clients/flower/trainer.py)

The executor takes the messages that the SuperNode has got, has the trainer answer them, and hands the answers in.  It
stands in for Flower's SuperExec and for the ClientApp process that it starts for each message (1.3 s of CPU each).  And
it runs what this site installed and nothing else: the bundle that comes with a run is never unpacked, let alone
imported (docs/adr/0017-executor.md).

The two speak through a socket in the folder where the trainer is met, which is this user's alone: a port would be there
for any account of the machine, to take before the SuperNode has it or to ask afterwards.

Started as `python -m clients.flower.supernode MEETING NAME LAST ARGUMENT...`; LAST is the file with the node id of the
site's last connection, beside which the egress ledger lies, and the arguments are flower-supernode's.
"""

import argparse
import contextlib
import functools
import json
import logging
import mmap
import os
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from clients.egress import LEDGER, UNRECORDED, Asked, asked_by, record_egress, record_receipt, refusal
from clients.flower.own_lines import FlowerTold, mark_of
from clients.flower.parts import Answered, Inside, Store, take_in_pieces
from clients.flower.patches import Pace, hold_on, quicken
from clients.flower.trainer import API, CLIENT_FAILED, JOIN, KEY, TrainerGone, hand_over
from clients.site import MIDWAY
from common.protocol import beats
from common.protocol.beats import beat_of
from common.system.progress import FILE as PROGRESS
from common.system.runtime import give_back_what_is_freed, go_silent

ACQUIRE_TASK = "/flwr.proto.Runtime/AcquireTask"
BEAT_EVERY_S = 4.0  # the SuperNode gives a message up after a minute without one
LOOK_EVERY_S = 5.0  # beside being told: a message may have come while the last was answered
NOT_HERE = "it does not work on that task any more: its client was started again."
GOODBYES, BETWEEN_GOODBYES_S = 10, 1.0

log = logging.getLogger("facefed.client")


def own_arguments(meeting: Path) -> list[str]:
    """What flower-supernode is told beside what its caller says: whoever takes a message from it must know the key."""
    return [
        "--isolation", "process",
        "--superexec-auth-secret-file", str(meeting / KEY),
        "--host", "127.0.0.1",
    ]  # fmt: skip


def serve_in(meeting: Path) -> None:
    """Let Flower's SuperNode in this process serve its API through a socket of that folder, and at no port."""
    program: Any = uvicorn  # Flower says uvicorn.Config(...)
    program.Config = functools.partial(uvicorn.Config, uds=str(meeting / API))


class InFlight(Protocol):
    """Of Flower's `ProtobufRequestContext`: a request that is about to be sent."""

    @property
    def request(self) -> httpx.Request:
        """As httpx has it."""


class Interceptor(Protocol):
    """Of Flower's `ProtobufClientInterceptor`: stands between a client and the wire."""

    def intercept(self, context: Any, call_next: Any) -> httpx.Response:  # noqa: ANN401 - Flower's
        """The answer to one request."""


class ThroughSocket:
    """Of a client of the SuperNode's API, and the last: sends what it is given through the socket."""

    def __init__(self, meeting: Path) -> None:
        """meeting: the folder with the socket."""
        # Both: whatever the environment says of proxies, and of authorities, is of no use here.
        trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        way = httpx.HTTPTransport(uds=str(meeting / API), verify=trusted)
        self._line = httpx.Client(transport=way, verify=trusted, trust_env=False)

    def intercept(self, context: InFlight, _call_next: Callable[..., httpx.Response]) -> httpx.Response:
        """The answer to one request."""
        return self._line.send(context.request)


def leave_last(last: Path, arguments: list[str]) -> None:
    """Tell the server that this site's last connection is over, where it ended without a word.

    The server takes a node for connected until it has missed its heartbeats for a minute.  So long it would wait for
    the answer of one that was killed, and let nobody in with its key.  A site without a key (plain text) cannot say
    it: each of its connections signs with a key that Flower makes in the process, and that is gone.
    """
    parser = argparse.ArgumentParser(add_help=False)
    for option in ("--superlink", "--root-certificates", "--auth-supernode-private-key"):
        parser.add_argument(option)
    known, _ = parser.parse_known_args(arguments)
    if not (known.auth_supernode_private_key and last.exists()):
        return
    with FleetHttpClient.from_server_address(
        known.superlink,
        insecure=False,
        root_certificates=Path(known.root_certificates).read_bytes(),
        interceptors=_interceptors(known.auth_supernode_private_key),
    ) as fleet:
        for _ in range(GOODBYES):
            try:
                fleet.DeactivateNode(DeactivateNodeRequest(node_id=int(last.read_text(encoding="utf-8"))))
            except httpx.TransportError:  # not heard, or heard and the answer lost
                time.sleep(BETWEEN_GOODBYES_S)
                continue
            except (httpx.HTTPError, ValueError) as error:  # it left in order, or the server is another
                log.debug("the last connection needs no end (%s)", error)
            return


def _interceptors(private_key: str) -> list[Any]:
    """What the requests of a site with a key carry: Flower's version, and its signature."""
    version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    key = load_ssh_private_key(Path(private_key).read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is of another kind")  # noqa: TRY004 - like one that cannot be read
    return [version, NodeAuthHttpInterceptor(key, key.public_key())]


def may_go_on(content: RecordDict) -> bool:
    """Whether a trainer that goes may leave a part of the round that the message asks for."""
    try:
        settings = json.loads(str(content["task"]["settings"]))
        return asked_by(content).kind == "train" and settings["training"]["checkpoint_minutes"] != "off"
    except (KeyError, TypeError, ValueError):
        return False


def keep_on_disk(content: RecordDict, folder: Path) -> None:
    """Let the arrays' bytes lie in a file that has no name, so that they can be handed over again.

    Else each piece is given away when it is sent, so that a model is in memory once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for record in content.array_records.values():
        for array in record.values():
            pieces: Any = array.data
            with tempfile.TemporaryFile(dir=folder) as file:
                while isinstance(pieces, deque) and pieces:
                    file.write(pieces.popleft())
                if not file.tell():
                    continue  # whole already, or empty
                file.flush()
                array.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # type: ignore[assignment]


def last_written(path: Path) -> float:
    """When a file was written, in seconds since 1970; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class Job:
    """A task that the trainer works on, from a thread, until its answer is taken or it is left."""

    def __init__(self, meeting: Path, message: Message, state_dir: Path) -> None:
        """Hand the message's content over.  state_dir: the site's."""
        self.message_id, self.asked = message.metadata.message_id, asked_by(message.content)
        self.done, self.began = threading.Event(), time.time()
        self._folder = state_dir / "private" / self.asked.run_id if may_go_on(message.content) else None
        self._answer: RecordDict | str | TrainerGone = ""
        self._connection: Connection | None = None
        self._is_left = False
        self.answered = Answered()
        self._lock = threading.Lock()
        threading.Thread(target=self._work, args=(meeting, message.content), name="job", daemon=True).start()

    def _work(self, meeting: Path, content: RecordDict) -> None:
        try:
            self._answer = self._from_trainers(meeting, content)
        except TrainerGone as gone:
            self._answer = gone
        except Exception as error:
            log.warning("a task could not be handed over (%s)", repr(error))
            self._answer = TrainerGone("the trainer could not be asked; the client's own output says why.")
        self._connection = None
        self.done.set()

    def _from_trainers(self, meeting: Path, content: RecordDict) -> RecordDict | str:
        """The answer; of the next trainer where one went that had left more of a round than there was.

        Raises TrainerGone.
        """
        if self._folder is not None:
            keep_on_disk(content, self._folder)
        newest = self.began
        while True:
            try:
                return hand_over(meeting, content, self.answered.read, connected=self._connected)
            except TrainerGone:
                left = last_written(self._folder / MIDWAY) if self._folder is not None else 0.0
                if self._is_left or left <= newest:
                    raise
                newest, self.answered = left, Answered()
                log.warning("the trainer went in the middle of a round; the next one goes on after its last epoch")

    def _connected(self, connection: Connection) -> None:
        with self._lock:
            self._connection = connection
            if self._is_left:
                _hang_up(connection)

    def leave(self) -> None:
        """Nobody wants the answer any more: the trainer ends its work."""
        with self._lock:
            self._is_left = True
            if self._connection is not None:
                _hang_up(self._connection)

    def answer(self) -> RecordDict | str:
        """The answer, of one that is done.  Raises TrainerGone."""
        if isinstance(self._answer, TrainerGone):
            raise self._answer
        return self._answer

    def is_meant(self, again: str, asked: Asked) -> bool:
        """Whether a message asks for this task's answer once more: by its id, or to join the same run."""
        if again:
            return again == self.message_id
        return asked.kind == JOIN and (asked.kind, asked.run_id) == (self.asked.kind, self.asked.run_id)


def _hang_up(connection: Connection) -> None:
    """End a connection under whoever reads it; to close it would not wake that thread."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)


class Executor:
    """Answers one message after the other, for as long as its SuperNode lives.

    Where the server wants to hear of a site that works (`beat_s` of its task), an answer that is not there by then
    stays with its `Job`, a beat leaves instead, and the server asks again.
    """

    def __init__(self, meeting: Path, *, name: str, pace: Pace, ledger: Path, store: Store) -> None:
        """meeting: the folder where the trainer and the SuperNode are met.  name: the site's.

        ledger: the folder of the egress ledger, for what is said here in the trainer's place.  store: the SuperNode's.
        """
        self._meeting, self._name, self._pace, self._ledger = meeting, name, pace, ledger
        self._store = store
        self._job: Job | None = None
        self._secret, self._through = (meeting / KEY).read_bytes(), ThroughSocket(meeting)

    def serve(self) -> None:
        """Take what comes, for ever; whatever one message brings about, the next is taken."""
        guard = SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods=frozenset({ACQUIRE_TASK}))
        with self._client(guard) as client:
            while True:
                self._pace.wait_for_work(LOOK_EVERY_S)
                try:
                    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
                    if found.HasField("task") and found.token:
                        self._execute(found.token)
                except Exception as error:
                    log.warning("a message could not be answered (%s)", repr(error))

    def _client(self, *more: Interceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address="supernode",  # only the name in the request; the way is the socket
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *more, self._through],
            retry_invoker=None,
        )

    def _execute(self, token: str) -> None:
        with self._client(RuntimeTokenHttpInterceptor(token)) as client:
            context: Context | None = None
            status, details = SubStatus.FAILED, "the message could not be taken"
            answered = Answered()
            inside: Any = Inside(client, self._store.state, answered) if self._store.state else client
            with beating(client):
                try:
                    message, context, _, _ = pull_task_input(inside)
                    push_message(inside, self._answered(message, answered), context)
                    status, details = SubStatus.COMPLETED, ""
                finally:
                    push_task_output(client, context, status, details)
                    self._pace.tell_done()

    def _answered(self, message: Message, ready: Answered) -> Message:
        """The reply.  ready: is given the pieces of its arrays."""
        task: Mapping[str, Any] = message.content.get("task", ConfigRecord())
        again, wait_s = task.get("again", ""), task.get("beat_s", 0.0)
        asked, job = asked_by(message.content), self._job
        if job is None or not job.is_meant(str(again), asked):
            if again:
                return self._said(message, NOT_HERE)
            if job is not None and not job.done.is_set():
                job.leave()
            job = self._job = Job(self._meeting, message, self._ledger.parent)
        else:
            record_receipt(self._ledger, self._name, asked, str(task.get("received", "")))
        bounded = isinstance(wait_s, float) and wait_s > 0.0
        job.done.wait(min(max(wait_s, beats.SHORTEST_S), beats.LONGEST_S) if bounded else None)
        if not job.done.is_set():
            return self._beat(message, asked, job.began)
        self._job = None
        try:
            answer = job.answer()
        except TrainerGone as gone:
            return self._said(message, str(gone))
        ready.pieces = job.answered.pieces
        return self._reply(message, answer)

    def _beat(self, message: Message, asked: Asked, since: float) -> Message:
        """How far the trainer is, which is in the ledger before it leaves."""
        beat = beat_of(self._ledger.parent / PROGRESS, self._name, since=since)
        content = RecordDict({beats.RECORD: ConfigRecord(beat.values())})
        try:
            record_egress(self._ledger, self._name, asked, content)
        except OSError:
            return self._reply(message, UNRECORDED)
        return self._reply(message, content)

    def _said(self, message: Message, line: str) -> Message:
        return self._reply(message, refusal(self._ledger, self._name, message.content, f"{self._name}: {line}"))

    @staticmethod
    def _reply(message: Message, answer: RecordDict | str) -> Message:
        if isinstance(answer, str):
            return Message(Error(code=CLIENT_FAILED, reason=answer), reply_to=message)
        return Message(answer, reply_to=message)


@contextlib.contextmanager
def beating(client: RuntimeHttpClient) -> Iterator[None]:
    """In here the SuperNode is told every few seconds that its message is being worked on.

    Flower's own ends the process when nobody wants the message any more; and a beat that is lost is made up for by the
    next, of which several pass before the SuperNode gives a message up.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.is_set():
            with contextlib.suppress(httpx.HTTPError):
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            ended.wait(BEAT_EVERY_S)

    thread = threading.Thread(target=beat, name="heart", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def main(meeting: Path, name: str, last: Path, arguments: list[str]) -> None:
    """Serve until the SuperNode ends."""
    go_silent()
    logging.getLogger("flwr").addHandler(FlowerTold(mark_of((meeting / KEY).read_bytes()), sys.stderr.fileno()))
    hold_on()
    leave_last(last, arguments)
    pace = Pace()
    quicken(pace)
    serve_in(meeting)
    give_back_what_is_freed()
    take_in_pieces()
    store = Store()
    store.follow()
    executor = Executor(meeting, name=name, pace=pace, ledger=last.parent / LEDGER, store=store)
    threading.Thread(target=executor.serve, name="executor", daemon=True).start()
    sys.argv = ["flower-supernode", *own_arguments(meeting), *arguments]
    flower_supernode()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
