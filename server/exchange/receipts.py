"""Receipts: the server writes down what it received of each client, and tells the client with its next task.

A site's ledger says what left; with the receipts beside it the site, or an auditor with both files, sees that this and
nothing else arrived.  It stands between the round loop and the mailbox, so that whatever comes has its line, also what
is refused afterwards.  Hashing goes on in a thread of its own beside the checks and the adding: one reply at a time.
"""

import logging
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message

from common.names import CLIENT_NAME
from common.protocol.ledger import RECEIVED_FILE, parts_of, receipt_of, reply_line
from common.protocol.wire import CLIENT_FAILED, SITE, TASK
from common.system.files import append_line
from server.exchange.mailbox import Mailbox

log = logging.getLogger("facefed.server")


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A task that was sent."""

    node_id: int
    kind: str
    server_round: int


class ReceiptMailbox:
    """A Mailbox that keeps receipts."""

    def __init__(self, mailbox: Mailbox, folder: Path, run_id: str) -> None:
        """mailbox: where messages really go.  folder: the run's, which has the record."""
        self._mailbox, self._path, self._run_id = mailbox, folder / RECEIVED_FILE, run_id
        self._sent: dict[str, Sent] = {}  # message id -> its task, while there is no reply
        self._names: dict[int, str] = {}  # node -> the name it joined with
        self._receipts: dict[int, str] = {}  # node -> of its last reply, as common.protocol.ledger.RECEIPT
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="receipts")
        self._at_work: Future[None] | None = None

    def node_ids(self) -> list[int]:
        """The nodes that are connected now."""
        return self._mailbox.node_ids()

    def send(self, messages: Iterable[Message]) -> list[str]:
        """Send, each message with the receipt for what its node sent last."""
        self.settle()
        messages, tasks = list(messages), []
        for message in messages:
            task: Any = message.content[TASK]
            node = message.metadata.dst_node_id
            task["received"] = self._receipts.get(node, "")
            tasks.append(Sent(node_id=node, kind=str(task["kind"]), server_round=int(task["server_round"])))
        ids = self._mailbox.send(messages)
        self._sent |= {message_id: task for message_id, task in zip(ids, tasks, strict=True) if message_id}
        return ids

    def receive(self, message_id: str, deadline: float | None = None) -> Message | None:
        """The reply to that message, whose line is being written, or None while there is none."""
        self.settle()  # so that the next reply does not lie in memory beside the one before
        message = self._mailbox.receive(message_id, deadline)
        if message is not None and message_id in self._sent:
            self._at_work = self._hasher.submit(self._take_down, self._sent.pop(message_id), message)
        return message

    def is_short(self, message_id: str) -> bool:
        """As the mailbox behind it says."""
        return self._mailbox.is_short(message_id)

    def settle(self) -> None:
        """Wait until what was received is written down."""
        at_work, self._at_work = self._at_work, None
        if at_work is not None:
            at_work.result()

    def close(self) -> None:
        """Write what is left."""
        self.settle()
        self._hasher.shutdown()

    def _take_down(self, sent: Sent, message: Message) -> None:
        """The line of one reply; whatever a client sends, and a full disk too, the run goes on."""
        try:
            self._write(sent, message)
        except Exception as error:
            log.warning("a reply is not in %s (%s)", self._path, repr(error))

    def _write(self, sent: Sent, message: Message) -> None:
        content: Any
        if message.has_error():
            if message.error.code != CLIENT_FAILED:
                return  # Flower's own words: the client did not say them
            content = message.error.reason or ""
        else:
            content = message.content
            if SITE in content:
                name = content[SITE].get("name")
                if isinstance(name, str) and CLIENT_NAME.fullmatch(name):
                    self._names[sent.node_id] = name
        line = reply_line(
            "received",
            client=self._names.get(sent.node_id, ""),
            run=self._run_id,
            server_round=sent.server_round,
            answer_to=sent.kind,
            parts=parts_of(content),
        )
        self._receipts[sent.node_id] = receipt_of(line)
        append_line(self._path, line, synced=False)
